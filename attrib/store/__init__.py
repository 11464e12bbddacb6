"""A recorded run on disk: Zarr v3 arrays with named dimensions, written in blocks of steps, the commit marker last.

- `schema`: what is stored, under which name, with which dimensions; the format version
- `examples`: each distinct input stored once, found again by its hash
- `ids`: ids that are strings, and the numbers that stand for them
- `codec`: differences along the step axis, before compression
- `creation`: the group and arrays that fit the first step, or nothing
- `writer`: append steps, commit blocks, on a thread of its own
- `cube`: all contributions of a sweep, when asked for
- `reader`: open, check that every committed chunk is there, read

The only importer of zarr. No pickle anywhere.
"""

from .creation import StepRecord, check_target
from .cube import CubeWriter
from .ids import Ids
from .reader import Reader
from .schema import FORMAT, local_path
from .writer import Writer

__all__ = ["FORMAT", "CubeWriter", "Ids", "Reader", "StepRecord", "Writer", "check_target", "local_path"]
