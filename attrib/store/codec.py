"""A Zarr v3 codec: differences along the step axis before the compressor sees them (`kernels.steps`). Lossless.

Zarr finds it by its entry point, so any reader opens the arrays where attrib is installed.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from zarr.abc.codec import ArrayArrayCodec
from zarr.registry import register_codec

from ..kernels import steps

NAME = "attrib.step_delta"


@dataclass(frozen=True)
class StepDelta(ArrayArrayCodec):
    """Of arrays (step, ...) with 4- or 8-byte entries."""

    is_fixed_size = True

    @classmethod
    def from_dict(cls, data: Any) -> "StepDelta":
        return cls()

    def to_dict(self) -> dict[str, Any]:
        return {"name": NAME, "configuration": {}}

    def validate(self, *, shape: tuple[int, ...], dtype: Any, chunk_grid: Any) -> None:
        size = dtype.to_native_dtype().itemsize
        if not shape or size not in (4, 8):
            raise ValueError(f"{NAME} takes arrays (step, ...) of 4 or 8 bytes: got shape {shape}, {size} bytes.")

    async def _encode_single(self, chunk_array: Any, chunk_spec: Any) -> Any:
        return _apply(steps.encode, chunk_array)

    async def _decode_single(self, chunk_array: Any, chunk_spec: Any) -> Any:
        return _apply(steps.decode, chunk_array)

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        return input_byte_length


def _apply(function: Any, chunk: Any) -> Any:
    return chunk.from_numpy_array(function(np.asarray(chunk.as_numpy_array())))


register_codec(NAME, StepDelta)  # in the source tree there is no entry point
