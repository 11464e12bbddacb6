"""A recorded run on disk: Zarr v3 arrays with named dimensions, written in blocks of steps, the commit marker last.

- `schema`: what is stored, under which name, with which dimensions; the format version
- `place`, `disk`, `lease`, `owner`: where a store stands, how it gets to the disk, who writes to it, whether it is ours
- `metadata`, `facts`, `seal`: what a store and its header may contain; digests over all that it holds
- `sealing`, `checked`: a store as it is written, as it is read
- `examples`: each distinct input stored once, found again by its hash; `passes`: what a step's gradient was made of
- `ids`: ids that are strings, and the numbers that stand for them
- `creation`: the group and arrays that fit the first step, or nothing
- `writer`: append steps, commit blocks, on a thread of its own; `resumption`: go on where a run ended early
- `chunks`: rows of all else, written past zarr
- `vectors`: parameters, gradients and accumulators, written from where they lie; `compaction`: a finished run in less room
- `reader`: open, check that every committed chunk is there and is the one that was written, read
- `rows`: what is stored of a step by itself
- `datasets`: results, as labelled arrays
- `cube`: all contributions of a sweep, when asked for

The only importer of zarr. No pickle anywhere.
"""

from .compaction import Compaction, compact
from .creation import PassRecord, StepRecord
from .cube import CubeWriter
from .datasets import open_dataset, save_dataset
from .ids import Ids
from .owner import check_target, same_place, stands
from .passes import Pass, Passes
from .place import local_path
from .reader import Reader
from .resumption import Reopened, lease, reopen
from .rows import Rows
from .schema import FACTS, FORMAT, PASS_FACTS
from .writer import Writer, close_dropped

__all__ = [
    "FACTS",
    "FORMAT",
    "PASS_FACTS",
    "Compaction",
    "CubeWriter",
    "Ids",
    "Pass",
    "PassRecord",
    "Passes",
    "Reader",
    "Reopened",
    "Rows",
    "StepRecord",
    "Writer",
    "check_target",
    "close_dropped",
    "compact",
    "lease",
    "local_path",
    "open_dataset",
    "reopen",
    "same_place",
    "save_dataset",
    "stands",
]
