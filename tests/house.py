"""The house: which unit of attrib, a module or a folder, stands on which floor. It imports strictly lower floors alone."""

from typing import NamedTuple


class Floor(NamedTuple):
    """units: names of modules and folders of `attrib`, that do not import one another."""

    what: str
    units: tuple[str, ...]


FLOORS = (
    Floor("arrays", ("kernels",)),
    Floor(
        "words and numbers",
        ("autocast", "budget", "constants", "ending", "errors", "generators", "interrupt", "layout", "ledger"),
    ),
    Floor("nouns", ("batch", "drawn", "functional", "marginals", "measure", "program", "wrapper")),
    Floor("sums", ("inputs", "losses", "parts", "setup", "tally")),
    Floor("from torch and disk to arrays", ("checks", "curvature", "gradients", "optim", "path", "store")),
    Floor("steps and results", ("announced", "buffers", "capture", "result")),
    Floor("states", ("trajectory",)),
    Floor("steps as they are read, the loop", ("announcing", "loop", "matching", "steps")),
    Floor("reading, going on", ("ranks", "resume", "run")),
    Floor("recording, losses once more", ("clipped", "penalised", "recomputed", "recorder")),
    Floor("what a sweep asks", ("query", "sensitivity", "shares")),
    Floor("questions and plans", ("accounting", "executor", "plan", "side", "verify")),
    Floor("the account", ("account", "averaged", "pair")),
    Floor("what separates two runs", ("asked", "causes")),
    Floor("one sweep", ("backwards", "sweep")),
    Floor("the long calls", ("attribute", "derivatives", "difference", "intervention")),
    Floor("for people", ("counterfactual", "development", "phases", "report")),
    Floor("derivatives that are tried", ("influence",)),
    Floor("where people train", ("hf", "lightning")),
    Floor("studies", ("studies",)),
    Floor("doors", ("cli", "__init__")),
    Floor("the command", ("__main__",)),
)

FOREIGN = {  # other packages, and the only units that may import them
    "cloudpickle": {"executor"},
    "matplotlib": {"report"},
    "pickle": {"executor"},
    "plotly": {"report"},
    "zarr": {"store"},
}

IGNORED = {  # the lines that mypy does not judge: file -> code, and why
    "attrib/path/rules.py": ("misc", "torch types vjp as if it always returned auxiliary values"),
    "attrib/announcing.py": ("override", "step takes the ids and the batch where an optimizer takes a closure"),
    "kernels/slopes.py": ("misc", "torch types vjp as if it always returned auxiliary values"),
}


def picture() -> str:
    """The house, the top floor first."""
    width = max(len(floor.what) for floor in FLOORS)
    return "\n".join(f"{floor.what.ljust(width)}  {'  '.join(floor.units)}" for floor in reversed(FLOORS))


if __name__ == "__main__":
    print(picture())
