"""The nodes of a dense model, found without naming architectures, so that it can be pruned as the sparse one is.

    read      input of a sublayer's first linear maps, after the norm                    attn_in, mlp_in
    channels  output of attention's first linear maps: queries, keys and values          named by their modules (q_proj, c_attn)
    neurons   input of the MLP's last linear map, after the nonlinearity                 mlp_act
    write     output of a sublayer's last linear map                                     attn_out, mlp_out

They are found on probe tokens, by intervening:

1. The output of every linear map (nn.Linear, transformers' Conv1D) of a block that is called once is disturbed in turn; the map
   feeds the other maps whose inputs change. In a sublayer, the first maps are fed by no other and must all read the same input.
   There must be exactly one last map, which feeds no other.
2. A sublayer is attention if disturbing early positions of its first maps' outputs changes later inputs of its last map.
3. At the first position attention has nothing else to attend to, so the last map's input there *is* the value: its columns are
   matched with channels of the first maps by equality. The match also tells queries and keys from values in fused maps, and which
   columns share a value if heads do.
4. Neurons are columns of the MLP's last map; rows of its first maps belong to neurons in order (twice in fused gated maps).

A model in which one of the steps fails (mixtures of experts, low-rank attention, recurrent sublayers) is refused.

Gates are hooks on these linear maps during a run. Embedding, unembedding, norms and biases are not edges.

`MaskedDense` has masks over these nodes, as the sparse model has over its own, so the same search finds the dense circuit.

Shape legend: b prompt (row), r masked copy of a prompt, t token, n nodes of a location, f all nodes in one row, k some of them by
index, j, i rows and columns of a matrix, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bridge.circuits.masked_model import Masked
from bridge.circuits.question import Question
from bridge.circuits.subject import Matrix
from bridge.huggingface.site_discovery import DenseModelError, forward, probe_tokens
from bridge.models.circuit import NodeSpace
from bridge.models.dense import DenseModel
from bridge.models.dense_run import lock_runs
from bridge.models.span import dense_of
from bridge.models.sparse import Gate, Location

_MEAN_ROWS = 8  # corpus rows in a batch


class _RecordedMaps(NamedTuple):
    """Inputs and outputs of linear maps on the probe, in the order of their calls."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class _Sublayer(NamedTuple):
    """The linear maps of a sublayer by module path: the first ones and the last one."""

    layer: int
    attention: bool
    first: tuple[str, ...]
    last: str


class DenseSubject:
    """A dense model, or a span of one, with its nodes found. Raises DenseModelError if its linear maps cannot be found."""

    def __init__(self, dense: DenseModel, corpus_bt: Tensor) -> None:
        self.dense, self.device = dense, dense.device
        self._whole = dense_of(dense, None)  # a span reuses remembered residuals, which bypass the gates
        if not corpus_bt.numel():
            raise ValueError("corpus means need reference tokens, and there are none; give at least one block")
        self._linear = {path: module for path, module in dense.model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
        self._before: dict[str, Location] = {}
        self._after: dict[str, Location] = {}
        self._sizes: dict[Location, int] = {}
        self._matrices: list[Matrix] = []
        with torch.no_grad():
            self._probe_bt = probe_tokens(dense.model, f"model {dense.name!r}", dense.context)
            seen = self._record_maps()
            for sublayer in self._sublayers(seen):
                (self._wire_attention if sublayer.attention else self._wire_mlp)(sublayer, seen)
            self.space = NodeSpace(self._sizes, 1)
            self.means: Mapping[Location, Tensor] = self._means(corpus_bt)

    def matrices(self) -> tuple[Matrix, ...]:
        """Return every matrix between nodes."""
        return tuple(self._matrices)

    def run(self, tokens_bt: Tensor, gate: Gate) -> Tensor:
        """Return logits_btv of some tokens, with every node passed through the gate."""
        done: dict[Location, Tensor] = {}  # a read is gated once, for all maps that it feeds

        def gated(location: Location, x: Tensor) -> Tensor:
            if location not in done:
                done[location] = gate(location, x.reshape(*tokens_bt.shape, x.shape[-1]))
            return done[location].reshape(x.shape)

        def before(location: Location, _module: nn.Module, args: tuple) -> tuple:
            return (gated(location, args[0]), *args[1:])

        def after(location: Location, _module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
            return gated(location, output)

        with lock_runs(), ExitStack() as hooks:
            for path, location in self._before.items():
                hooks.enter_context(self._linear[path].register_forward_pre_hook(partial(before, location)))
            for path, location in self._after.items():
                hooks.enter_context(self._linear[path].register_forward_hook(partial(after, location)))
            return self._whole.run(tokens_bt).logits_btv

    def _means(self, corpus_bt: Tensor) -> dict[Location, Tensor]:
        sums = {location: torch.zeros(n, dtype=torch.float64) for location, n in self._sizes.items()}

        def add(location: Location, x_btn: Tensor) -> Tensor:
            sums[location] += x_btn.cpu().double().sum((0, 1))
            return x_btn

        for rows_bt in corpus_bt.to(self.device).split(_MEAN_ROWS):
            self.run(rows_bt, add)
        return {location: (total_n / corpus_bt.numel()).float().to(self.device) for location, total_n in sums.items()}

    # -- finding the nodes ----------------------------------------------------------------------------------------------

    def _refuse(self, layer: int, what: str) -> DenseModelError:
        return DenseModelError(
            f"the linear maps of model {self.dense.name!r}",
            f"cannot be found in block {layer}: {what}",
            "give ‹no_dense› to skip the comparison with the dense model's circuits",
        )

    def _record_maps(self, changed: str | None = None, change: Callable[[Tensor], Tensor] | None = None) -> _RecordedMaps:
        """Return inputs and outputs of the linear maps on the probe; `change` alters the output of the map `changed`."""
        seen, twice, shape = _RecordedMaps({}, {}), set[str](), (*self._probe_bt.shape, -1)

        def watch(path: str, _module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            twice.update({path} & seen.inputs.keys())
            if args[0].numel() // args[0].shape[-1] != self._probe_bt.numel():  # called on other tokens than the probe's
                return None
            seen.inputs[path], seen.outputs[path] = args[0].reshape(shape).clone(), output.reshape(shape).clone()
            if path == changed and change is not None:
                return change(output.reshape(shape)).reshape(output.shape)
            return None

        with lock_runs(), ExitStack() as hooks:
            for path, module in self._linear.items():
                hooks.enter_context(module.register_forward_hook(partial(watch, path)))
            forward(self.dense.model, self._probe_bt)
        for path in twice:
            del seen.inputs[path], seen.outputs[path]
        return seen

    def _sublayers(self, seen: _RecordedMaps) -> list[_Sublayer]:
        found: list[_Sublayer] = []
        for layer, block in enumerate(self.dense.blocks):
            prefix = next(f"{path}." for path, module in self.dense.model.named_modules() if module is block.module)
            paths = [path for path in seen.inputs if path.startswith(prefix)]
            every = [path for path in self._linear if path.startswith(prefix)]
            if not paths or len(paths) != len(every):
                odd = next((path for path in every if path not in paths), "none")
                raise self._refuse(layer, f"not every map is called exactly once on every token ({odd.removeprefix(prefix)})")
            feeds = {path: self._maps_fed_by(path, paths, seen) for path in paths}
            here: list[_Sublayer] = []
            for group in self._split(paths, feeds, block.middle is not None):
                first = tuple(path for path in group if not any(path in feeds[other] for other in group))
                last = [path for path in group if path not in first]
                same_input = all(torch.equal(seen.inputs[path], seen.inputs[first[0]]) for path in first)
                if len(last) != 1 or not first or not same_input:
                    names = ", ".join(path.removeprefix(prefix) for path in group)
                    raise self._refuse(layer, f"{names} are not maps that read the same input, followed by one last map")
                attention = any(self._mixes_positions(path, last[0], seen) for path in first)
                here.append(_Sublayer(layer, attention, first, last[0]))
            if sorted(sublayer.attention for sublayer in here) != [False, True]:
                kinds = " and ".join("attention" if sublayer.attention else "an MLP" for sublayer in here)
                raise self._refuse(layer, f"its sublayers are {kinds}, not attention and an MLP")
            found += here
        return found

    def _maps_fed_by(self, path: str, others: Sequence[str], seen: _RecordedMaps) -> set[str]:
        """Return the other maps whose inputs change when the output of a map is disturbed."""
        noise = torch.randn(seen.outputs[path].shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        now = self._record_maps(path, lambda output: output + (1 + output.std()) * noise.to(output.dtype))
        return {other for other in others if other != path and not torch.equal(now.inputs[other], seen.inputs[other])}

    def _split(self, paths: Sequence[str], feeds: Mapping[str, set[str]], sequential: bool) -> list[list[str]]:
        """Return a block's sublayers: the first ends with the map that feeds all later ones; parallel ones are not connected."""
        if sequential:
            # the first sublayer's last map feeds the whole second sublayer: it is the earliest map that feeds every map called
            # after it and is fed by every map called before it
            for place, path in enumerate(paths[:-1]):
                before, after = paths[:place], paths[place + 1 :]
                if before and all(path in feeds[other] for other in before) and feeds[path] >= set(after):
                    return [list(paths[: place + 1]), list(after)]
            return [list(paths)]
        groups: list[list[str]] = []
        for path in paths:
            near = [group for group in groups if any(path in feeds[other] or other in feeds[path] for other in group)]
            groups = [group for group in groups if group not in near]
            groups.append([*(other for group in near for other in group), path])
        return groups

    def _mixes_positions(self, path: str, last: str, seen: _RecordedMaps) -> bool:
        """Return whether early positions of a map's output affect later positions of the last map's input."""
        half = self._probe_bt.shape[1] // 2
        now = self._record_maps(path, lambda output: torch.cat([output[:, :half].roll(1, 0) * 2 + 1, output[:, half:]], 1))
        return not torch.equal(now.inputs[last][:, half:], seen.inputs[last][:, half:])

    def _location(self, location: Location, size: int) -> Location:
        if location in self._sizes:
            raise self._refuse(location.layer, f"two locations are named {location.kind}")
        self._sizes[location] = size
        return location

    def _wire_attention(self, sublayer: _Sublayer, seen: _RecordedMaps) -> None:
        layer, taken = sublayer.layer, seen.inputs[sublayer.last]
        read = self._location(Location(layer, "attn_in"), seen.inputs[sublayer.first[0]].shape[-1])
        value_bj = torch.cat([seen.outputs[path][:, 0] for path in sublayer.first], -1)
        off_ij = (taken[:, 0].T[:, None] - value_bj.T[None]).abs().amax(-1)
        off_i, channel_i = off_ij.min(1)
        if not bool((off_i <= 1e-4 * taken[:, 0].abs().max()).all()):
            raise self._refuse(layer, f"the input of {sublayer.last.rsplit('.', 1)[-1]} is not the attended values")
        start, owners = 0, list[tuple[Location, int, int]]()
        for path in sublayer.first:
            self._before[path] = read
            end = start + seen.outputs[path].shape[-1]
            channels = self._after[path] = self._location(Location(layer, path.rsplit(".", 1)[-1]), end - start)
            owners.append((channels, start, end))
            self._add(path, read, channels)
            start = end
        write = self._after[sublayer.last] = self._location(Location(layer, "attn_out"), seen.outputs[sublayer.last].shape[-1])
        weight_ji = _weight(self._linear[sublayer.last])
        target_j = torch.arange(len(weight_ji), device=weight_ji.device)
        for channels, start, end in owners:
            here_i = ((channel_i >= start) & (channel_i < end)).nonzero().flatten()
            if len(here_i):
                self._matrices.append(Matrix(channels, write, weight_ji[:, here_i], channel_i[here_i] - start, target_j))

    def _wire_mlp(self, sublayer: _Sublayer, seen: _RecordedMaps) -> None:
        layer = sublayer.layer
        read = self._location(Location(layer, "mlp_in"), seen.inputs[sublayer.first[0]].shape[-1])
        neurons = seen.inputs[sublayer.last].shape[-1]
        act = self._before[sublayer.last] = self._location(Location(layer, "mlp_act"), neurons)
        write = self._after[sublayer.last] = self._location(Location(layer, "mlp_out"), seen.outputs[sublayer.last].shape[-1])
        for path in sublayer.first:
            self._before[path] = read
            if seen.outputs[path].shape[-1] % neurons:
                raise self._refuse(layer, f"{path.rsplit('.', 1)[-1]} does not output a whole number of values per neuron")
            self._add(path, read, act)
        self._add(sublayer.last, act, write)

    def _add(self, path: str, source: Location, target: Location) -> None:
        weight_ji = _weight(self._linear[path])
        rows, columns = weight_ji.shape
        column_i = torch.arange(columns, device=weight_ji.device)
        target_j = torch.arange(rows, device=weight_ji.device) % self._sizes[target]
        self._matrices.append(Matrix(source, target, weight_ji, column_i, target_j))


def _weight(module: Any) -> Tensor:
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


class MaskedDense(Masked):
    """A dense model on a question's prompts, with masks over its channels or, for one prompt, over channels at its positions."""

    def __init__(self, subject: DenseSubject, question: Question, *, by_position: bool = False) -> None:
        super().__init__(question, subject.space.sizes, subject.means, by_position=by_position)
        self.subject = subject

    def _last_logits(self, row_r: Tensor, gate: Gate, correct: Gate) -> Tensor:
        logits_rtv = self.subject.run(self.question.prompt_bt[row_r], gate)
        return logits_rtv[torch.arange(len(row_r), device=self.device), self.question.last_b[row_r]].float()
