"""Decoding steps that follow each other without waiting for the device.

The tokens that were sampled last stay on the device, where the next step reads them; tokens, log-probs and whatever
else was recorded are read every few steps. With static shapes a step can be captured as a CUDA graph, which launches
its hundreds of kernels at once.
"""

import logging
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..models.rounding import widest
from .shared_prefix import KeyValueStore, Layout, Span


logger = logging.getLogger(__name__)

READ_EVERY = 8
"""Most decoding steps between two readings, where tokens are not read after each."""
LEAST_ROWS = 8
"""Fewest rows of a captured step; other numbers are powers of two, or all rows."""
CAPTURED_WIDTH = 256
"""Captured steps attend to a multiple of so many own tokens."""


def capture_cuda_graph(run: Callable[[], None]) -> Callable[[], None]:
    """
    Capture what a function does on the current CUDA device, and do it once.

    Args:
        run (`Callable`):
            The function. Whatever it reads and writes must stay where it is in memory.

    Returns:
        `Callable`: does it again.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return graph.replay


CAPTURES: dict[str, Callable[[Callable[[], None]], Callable[[], None]]] = {"cuda": capture_cuda_graph}
"""What captures a step on a type of device: runs it, and returns what repeats it, or raises `RuntimeError`."""

_Kind: TypeAlias = tuple[int, int]
"""Number of rows, and the width of what they attend to."""
Step: TypeAlias = Callable[[Span, Tensor, Tensor], Sequence[Tensor]]
"""Runs the model over a span of the rows' last tokens, int64, shape (B, 1), and samples with the given noise, shape
(B,); returns the sampled tokens, int64, shape (B,), and what is recorded of each, shape (B,)."""


class Decoder:
    """
    The rows in the first slots of a store, each of which gets a token at every step.

    Args:
        step (`Callable`):
            Samples a token for each row, see [`Step`].
        store ([`KeyValueStore`]):
            Keys and values of the rows.
        captures (`bool`, *optional*, defaults to `False`):
            Whether steps are captured, where that is possible on the device.

    Attributes:
        fixed (`bool`): whether steps are captured, so that their shapes have to recur: they run over rows that are not
            decoded, and over a width of the store that is not in use.
    """

    def __init__(self, step: Step, store: KeyValueStore, captures: bool = False):
        self._step, self._store = step, store
        self._device = store.prompt_lengths.device
        self.fixed = captures and self._device.type in CAPTURES
        self._refused = False  # whether a capture has failed
        self._tokens = torch.zeros(store.rows, dtype=torch.int64, device=self._device)
        self._lengths = torch.zeros_like(self._tokens)
        self._noise: Tensor | None = None
        self._layout: Layout | None = None
        self._layouts: dict[int, Layout] = {}  # those that captured steps read, by number of rows
        self._count = self._longest = 0
        self._level = False
        self._unread: list[Tensor] = []
        self._results: dict[_Kind, Tensor] = {}  # what a captured step records
        self._replays: dict[_Kind, Callable[[], None]] = {}

    @property
    def unread(self) -> int:
        """Number of steps whose tokens have not been read."""
        return len(self._unread)

    def rows_of(self, count: int) -> int:
        """Return how many rows a step of `count` rows runs over: these, and others where that is `fixed`."""
        return min(max(LEAST_ROWS, 1 << (count - 1).bit_length()), self._store.rows) if self.fixed else count

    def begin(self, tokens: Sequence[int], lengths: Sequence[int], count: int, layout: Layout) -> None:
        """
        Begin to decode rows, of which everything has been read.

        Args:
            tokens (`Sequence[int]`):
                Last token of each of the rows that a step runs over.
            lengths (`Sequence[int]`):
                Stored own tokens of each.
            count (`int`):
                How many of them are decoded. What is written to the others is after their own tokens, and not kept.
            layout ([`Layout`]):
                How they share prompts. Where the number of rows is `fixed`, it is copied into the first.
        """
        rows = len(tokens)
        self._tokens[:rows] = torch.tensor(tokens, device=self._device)
        self._lengths[:rows] = torch.tensor(lengths, device=self._device)
        self._count, self._longest = count, max(lengths)
        self._level = min(lengths) == self._longest
        self._layout = layout
        if self.fixed:
            self._layout = self._layouts.setdefault(rows, layout)
            self._layout.copy_(layout)

    def advance(self, noise: Tensor, captured: bool = True) -> None:
        """
        Sample a token for each row.

        Args:
            noise (`Tensor`):
                Noise of the rows that are decoded, shape (B,), on the CPU or on the device.
            captured (`bool`, *optional*, defaults to `True`):
                Whether the step may be one that was captured: the host decides nothing in it.
        """
        rows = self.rows_of(self._count)
        noise = self._on_device(noise)
        if self._noise is None:
            self._noise = noise.new_zeros(self._store.rows)
        self._noise[: self._count] = noise
        noise = self._noise[:rows]
        if self.fixed and captured and not self._refused:
            found = self._run_captured(rows, noise)
        else:
            found = self._run(rows, self._longest, self._level, noise)
        self._unread.append(found[:, : self._count])
        self._longest += 1

    def read(self) -> list[list[list[float]]]:
        """Return what was recorded since the last reading: for each step the tokens, then each of the other figures,
        of all its rows."""
        if not self._unread:
            return []
        steps = torch.stack(self._unread).tolist()  # the one place where the host waits for the device
        self._unread = []
        return steps

    def _on_device(self, noise: Tensor) -> Tensor:
        """Return noise on the device; its transfer does not hold up the host."""
        if self._device.type == "cuda" and noise.device.type == "cpu":
            noise = noise.pin_memory()
        return noise.to(self._device, non_blocking=True)

    def _run(self, rows: int, longest: int, level: bool, noise: Tensor) -> Tensor:
        """Run a step, and return the tokens and what is recorded of them, shape (F, B)."""
        if self._layout is None:
            raise RuntimeError("Decoder.begin was not called before the first step.")
        lengths = self._lengths[:rows]
        span = Span(self._layout, 0, lengths, 1, longest, level)
        sampled, *figures = self._step(span, self._tokens[:rows, None], noise)
        self._tokens[:rows] = sampled
        lengths += 1
        return torch.stack([part.to(widest(self._device)) for part in (sampled, *figures)])

    def _run_captured(self, rows: int, noise: Tensor) -> Tensor:
        """Run a step of static shapes: the first of its kind as it is, which also allocates what it needs, the second
        while it is captured, and later ones from the capture."""
        width = min(-(-(self._longest + 1) // CAPTURED_WIDTH) * CAPTURED_WIDTH, self._store.max_length)
        kind = rows, width

        def run() -> None:
            self._results[kind].copy_(self._run(rows, width - 1, False, noise))

        if kind in self._replays:
            self._replays[kind]()
        elif kind in self._results:
            self._replays[kind] = self._captured(run)
        else:
            self._results[kind] = self._run(rows, width - 1, False, noise)
        return self._results[kind].clone()

    def _captured(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run a step, and return what repeats it: a capture, or the step itself where that fails."""
        tokens, lengths = self._tokens.clone(), self._lengths.clone()
        try:
            return CAPTURES[self._device.type](run)
        except RuntimeError as error:
            logger.warning(
                "A decoding step of this model cannot be captured, so decoding runs without: %s",
                str(error).splitlines()[0],
            )
        self._refused = True
        self._tokens.copy_(tokens)  # it may have run in part
        self._lengths.copy_(lengths)
        run()
        return run
