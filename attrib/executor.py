"""Who does the work of a sweep: this process at once, or the workers of any `concurrent.futures.Executor`.

A worker is sent the work as bytes with its first task and keeps what it made of them, so that a network is traced once by
each; one that comes later says that it does not have it.
It does one task at a time, whatever the executor: a loss and a model are not made to be run twice at once, and random
numbers have one state a process. Tensors on the CPU travel as plain bytes, without shared memory.
"""

import io
import pickle
import signal
import threading
import traceback
import uuid
import warnings
from concurrent.futures import Executor, Future
from dataclasses import replace
from multiprocessing import parent_process
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import WorkerError

try:
    from cloudpickle import Pickler  # takes functions of a notebook and lambdas as well
except ImportError:
    from pickle import Pickler

PIECES = 32  # that a sweep is cut into at least, so that no worker waits for the last one


class Later(Protocol):
    """What a task will have given."""

    def result(self) -> Any: ...

    def cancel(self) -> bool: ...


class Pool(Protocol):
    """Who does some work. length: steps of a piece. ahead: pieces of a kind that may be under way."""

    length: int
    ahead: int

    def prepare(self, piece: range) -> Later: ...

    def contract(self, piece: range, traced: Any) -> Later:
        """Gives tallies, the last step first."""
        ...


class Done:
    """What was done at once."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def result(self) -> Any:
        return self._value

    def cancel(self) -> bool:
        return False


class Serial:
    """One piece after the other, in this process."""

    ahead = 1

    def __init__(self, work: Any) -> None:
        self._work, self.length = work, int(work.sensitivity.at_once)

    def prepare(self, piece: range) -> Done:
        return Done(self._work.prepare(piece))

    def contract(self, piece: range, traced: Any) -> Done:
        return Done(self._work.contract(piece, traced))


class Tasks:
    """Work sent to the workers of an executor, a task at a time. ahead: tasks that may be under way.

    Raises:
        WorkerError: something of the work cannot be sent.
    """

    def __init__(self, executor: Executor, work: Any, ahead: int) -> None:
        self._executor, self.ahead, self._key = executor, ahead, uuid.uuid4().hex
        self._introduced = 0  # tasks that the work was sent with
        try:
            self._work = packed((torch.get_default_dtype(), work))
        except Exception as error:
            raise WorkerError(
                f"the work cannot be sent to a worker: got {type(error).__name__}: {error}, expected model, measurement and "
                f"loss that pickle. Define them at the top of a module, or install cloudpickle (attrib[dask])."
            ) from error

    def task(self, where: str, method: str, *arguments: Any) -> "Remote":
        """A method of the work, on a worker. where: what it is done to, for errors."""
        self._introduced += 1
        return Remote(self, where, (method, packed(arguments)), introduced=self._introduced <= self.ahead)

    def send(self, task: tuple[str, bytes], introduced: bool) -> "Future[bytes]":
        """Once more if need be; `introduced`: with the work itself, for workers that do not have it yet."""
        work = self._work if introduced else None
        try:
            with warnings.catch_warnings():  # Dask's, of what is large
                warnings.filterwarnings("ignore", message="Sending large graph", category=UserWarning)
                return self._executor.submit(perform, self._key, work, *task)
        except RuntimeError as error:  # the executor is broken, or shut down
            future: Future[bytes] = Future()
            future.set_exception(error)
            return future


class Workers(Tasks):
    """The workers of an executor, for a sweep."""

    def __init__(self, executor: Executor, work: Any, ahead: int) -> None:
        self.length = max(1, min(int(work.sensitivity.at_once), len(work.window) // PIECES))
        blocks = -(-ahead * self.length // work.run.trajectory.block) + 1
        super().__init__(executor, replace(work, blocks=blocks), ahead)

    def prepare(self, piece: range) -> "Remote":
        return self.task(_steps(piece), "prepare", piece)

    def contract(self, piece: range, traced: Any) -> "Remote":
        return self.task(_steps(piece), "summed", piece, traced)


def _steps(piece: range) -> str:
    return f"the steps {piece.start} to {piece.stop}"


class Remote:
    """What a worker will have given for a task. where: what it is done to."""

    def __init__(self, tasks: Tasks, where: str, task: tuple[str, bytes], introduced: bool) -> None:
        self._tasks, self._where, self._task = tasks, where, task
        self._future = tasks.send(task, introduced)

    def result(self) -> Any:
        try:
            answer = self._future.result()
            if answer == UNKNOWN:
                self._future = self._tasks.send(self._task, introduced=True)
                answer = self._future.result()
        except Exception as error:  # not of the work: that comes back as an answer
            raise WorkerError(
                f"a worker died, or could not be reached: got {type(error).__name__}: {error}, at "
                f"{self._where}. What was done before is the .result of this exception; repeat "
                f"the call with an executor that works, with fewer workers where memory ran out."
            ) from error
        well, value = unpacked(answer)
        if not well:
            raise value
        return value

    def cancel(self) -> bool:
        return self._future.cancel()


def pool_of(work: Any, executor: Executor | None, ahead: int) -> Pool:
    """This process, or the workers of an executor."""
    return Serial(work) if executor is None else Workers(executor, work, ahead)


# on the worker

UNKNOWN = b""  # the answer of a worker that does not have the work
_LOCK = threading.Lock()
_KNOWN: dict[str, tuple[torch.dtype, Any]] = {}  # the last work that was sent


def perform(key: str, work: bytes | None, method: str, arguments: bytes) -> bytes:
    """A task: whether it went well, and what it gave or the error, as bytes."""
    with _LOCK:
        if key not in _KNOWN and work is None:
            return UNKNOWN
        _leave_interrupts()
        before = torch.get_default_dtype()
        try:
            if key not in _KNOWN:
                assert work is not None
                _KNOWN.clear()
                _KNOWN[key] = unpacked(work)
            dtype, known = _KNOWN[key]
            torch.set_default_dtype(dtype)
            return packed((True, getattr(known, method)(*unpacked(arguments))))
        except Exception as error:
            return packed((False, _sendable(error)))
        finally:
            torch.set_default_dtype(before)


def _sendable(error: Exception) -> Exception:
    """With the place it was raised at; one that does not come through as it is, by its words."""
    try:
        unpacked(packed(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note("on a worker:\n" + traceback.format_exc())
    return error


def _leave_interrupts() -> None:
    """Ctrl-C in a terminal reaches every process: it is the caller's to act on."""
    worker = threading.current_thread() is threading.main_thread() and parent_process() is not None
    if worker and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Packer(Pickler):
    def reducer_override(self, value: Any) -> Any:
        if type(value) is Tensor and value.device.type == "cpu" and not value.requires_grad:
            try:
                return torch.from_numpy, (value.numpy(),)
            except (RuntimeError, TypeError):  # what numpy does not have, such as bfloat16
                pass
        return super().reducer_override(value) if hasattr(Pickler, "reducer_override") else NotImplemented


def packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Packer(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def unpacked(data: bytes) -> Any:
    return pickle.loads(data)
