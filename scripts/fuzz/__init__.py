"""Attempts to prove the store wrong: see `scripts/fuzz_store.py`.

- `trainings`: small training runs that use all of the store, recorded, ended early, gone on with
- `reading`: everything that can be read of a run or a result, each by itself, as bits
- `changes`: what can happen to files; `damage`: what reading says afterwards
- `taps`: a process's file operations, seen one by one
- `kills`: a process that ends in the middle of them; `power`: a disk that loses what was not made to last
"""
