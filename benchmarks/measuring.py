# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What the benchmarks of this folder share: calls timed in turn, peak memory in a process of its own, rows and tables.

A claim is a *row*: ``dict(name, ratio, bound, ok)``. A script has a function ``rows(quick, device)`` that measures,
prints its table and returns its rows; ``benchmarks/all.py`` collects them.
"""

import argparse
import ctypes
import gc
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from psaq_mm.commands.allocator import keep_freed_memory  # noqa: E402
from psaq_mm.quantization import use_full_float32  # noqa: E402
from psaq_mm.tables import markdown_table  # noqa: E402

Row = Dict[str, Any]


class Memory(NamedTuple):
    """Peak memory of a call, in bytes.

    Attributes:
        grown: Above what was held when the call began.
        total: All that the process (CPU) or PyTorch on the device held at most while it ran.
        result: What the call returned.
    """

    grown: int
    total: int
    result: Any = None


# ---------------------------------------------------------------------- time
def synchronise(device: str) -> None:
    """Wait for the device, which works on its own otherwise."""
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)


def in_turn(
    calls: Dict[str, Callable[[], Any]], repeats: int, device: str = 'cpu', warm_up: int = 1
) -> Dict[str, List[float]]:
    """Seconds of each call, one after the other and then again, so that a slow moment of the machine meets all of them.

    Args:
        calls: By name, in the order in which they run: one may use what the one before it left behind, such as the
            backward pass of a forward pass.
        repeats: Of each call.
        device: Waited for at the beginning and at the end of each call.
        warm_up: Rounds that are not counted.

    Returns:
        ``repeats`` seconds a name; the n-th ones belong together.
    """
    found: Dict[str, List[float]] = {name: [] for name in calls}
    for turn in range(warm_up + repeats):
        for name, call in calls.items():
            gc.collect()
            synchronise(device)
            begun = time.perf_counter()
            call()
            synchronise(device)
            if turn >= warm_up:
                found[name].append(time.perf_counter() - begun)
    return found


def ratio_of(ours: Sequence[float], control: Sequence[float]) -> float:
    """Median of the ratios of what was measured in the same turn."""
    return statistics.median(a / b for a, b in zip(ours, control))


def busy_share(seconds: float = 1.0) -> Optional[float]:
    """How much of the machine's CPU time others take while this process sleeps; None where the system does not tell."""

    def times():
        with open('/proc/stat', encoding='ascii') as file:
            values = [int(v) for v in file.readline().split()[1:]]
        return sum(values), values[3] + values[4]  # idle, and waiting for a disk

    try:
        before = times()
        time.sleep(seconds)
        after = times()
    except OSError:
        return None
    return 1 - (after[1] - before[1]) / max(after[0] - before[0], 1)


_FLAGS = ('avx2', 'avx512f', 'avx512_vnni', 'avx_vnni', 'avx512_bf16', 'amx_int8')
"""Those of x86 processors that decide which kernels of bytes there are."""


def processor() -> str:
    """One line: vendor, family, model, name and flags of the processor, where Linux tells them."""
    try:
        lines = Path('/proc/cpuinfo').read_text().split('\n\n')[0].splitlines()
    except OSError:
        return 'processor: not known'
    values = {key.strip(): value.strip() for key, _, value in (line.partition(':') for line in lines)}
    flags = [flag for flag in _FLAGS if flag in values.get('flags', '').split()]
    which = ', '.join(f'{name} {values[name]}' for name in ('cpu family', 'model') if name in values)
    return (
        f'processor: {values.get("vendor_id", "not known")}, {which}, {values.get("model name", "no name")}; '
        f'{os.cpu_count()} cores; {" ".join(flags) or "none of the flags looked for"}'
    )


# ---------------------------------------------------------------------- memory
def resident(kind: str = 'VmRSS') -> int:
    """Bytes of memory of this process (Linux): ``'VmRSS'`` now, ``'VmHWM'`` at most since it began or
    :func:`forget_peak`.
    """
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind + ':'))


def forget_peak() -> None:
    """Start the high-water mark of this process anew, and give what the allocator holds unused back to the system."""
    gc.collect()
    try:
        ctypes.CDLL('libc.so.6').malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another C library: what it holds counts as held
    Path('/proc/self/clear_refs').write_text('5')


def peak_of(call: Callable[[], Any], device: str = 'cpu') -> Memory:
    """Peak memory of a call in this process; what the process did before it may have left memory to be used again."""
    if torch.device(device).type == 'cuda':
        gc.collect()
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        synchronise(device)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        forget_peak()
        before = resident()
        result = call()
        peak = resident('VmHWM')
    return Memory(peak - before, peak, result)


def peak_apart(
    build: Callable[..., Callable[[], Any]],
    *arguments: Any,
    device: str = 'cpu',
    threads: Optional[int] = None,
    give_back: bool = False,
) -> Memory:
    """Peak memory of ``build(*arguments)()`` in a new process; what ``build`` itself takes does not count as growth.

    Args:
        build: Function of a module (the new process imports it by name): makes all that the call needs, and the call.
            The call's result has to be picklable.
        *arguments: Picklable.
        device: Whose memory counts.
        threads: Of PyTorch; as many as here if None.
        give_back: Whether the C library returns every large block to the system once it is free (glibc). What counts
            then is what was held, without the holes that its heap keeps, some tens of MiB more or less from one run to
            the next.
    """
    context = multiprocessing.get_context('spawn')
    setting = {'MALLOC_MMAP_THRESHOLD_': str(1 << 17)} if give_back else {}
    before = {name: os.environ.get(name) for name in setting}
    os.environ.update(setting)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_measured_apart, args=(sender, build, arguments, device, threads or torch.get_num_threads())
    )
    process.start()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        found = None
    process.join()
    if found is None:
        raise RuntimeError(
            f'the process that measured {build.__name__}{arguments} ended with exit code {process.exitcode}'
        )
    return Memory(*found)


def _measured_apart(sender, build: Callable, arguments: Sequence, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    keep_freed_memory()  # not where the blocks are given back
    sender.send(tuple(peak_of(build(*arguments), device)))
    sender.close()


# ---------------------------------------------------------------------- rows and tables
def row(name: str, ratio: float, bound: float, **more: Any) -> Row:
    """A claim and whether it holds: ``ratio`` is at most ``bound``. ``more`` is written beside it."""
    return dict(name=name, ratio=round(float(ratio), 4), bound=bound, ok=bool(ratio <= bound), **more)


def table_of(rows: Sequence[Row]) -> str:
    """The rows alone: name, ratio, bound, and whether it holds."""
    return markdown_table(
        ('claim', 'ratio', 'bound', 'holds'),
        [(r['name'], r['ratio'], f'{r["bound"]:g}', 'yes' if r['ok'] else 'no') for r in rows],
    )


def machine(device: str = 'cpu') -> str:
    """One line: PyTorch, threads, and the device."""
    name = f'{os.cpu_count()} cores' if torch.device(device).type == 'cpu' else torch.cuda.get_device_name(device)
    return f'torch {torch.__version__}, {torch.get_num_threads()} threads, {name}'


def begin(device: str, threads: int) -> bool:
    """Set this process up as the commands are, and say on what it runs; False, with one sentence, where there is no
    such device.
    """
    if torch.device(device).type == 'cuda' and not torch.cuda.is_available():
        print(f'--device {device}: PyTorch sees no such device here, take --device cpu', file=sys.stderr)
        return False
    torch.set_num_threads(threads)
    keep_freed_memory()
    use_full_float32()
    print(machine(device), flush=True)
    return True


def run_script(
    rows: Callable[..., List[Row]], description: str, parts: Sequence[str] = (), argv: Optional[Sequence[str]] = None
) -> int:
    """The command line of a benchmark: ``--quick``, ``--device``, ``--threads``, and ``--part`` where it has parts.

    Args:
        rows: Called with ``quick``, ``device`` and, where there are parts, the ``parts`` asked for.
        description: Help text.
        parts: Names of what can be measured alone; all without ``--part``.
        argv: Of the command line; that of the process if None.

    Returns:
        1 where a row does not hold, else 0. With ``--quick`` always 0: small sizes show that it runs, and nothing is
        judged.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='small sizes and few repeats')
    parser.add_argument('--device', default='cpu', help='cpu or cuda (default: %(default)s)')
    parser.add_argument('--threads', type=int, default=2, help='of PyTorch (default: %(default)s)')
    if parts:
        parser.add_argument('--part', choices=parts, help='measure this alone')
    args = parser.parse_args(argv)
    if not begin(args.device, args.threads):
        return 2
    asked = ((args.part,) if args.part else tuple(parts),) if parts else ()
    found = rows(args.quick, args.device, *asked)
    print(table_of(found), flush=True)
    return int(not args.quick and not all(r['ok'] for r in found))
