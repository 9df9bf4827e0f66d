"""Both sides of a weight sync without the rest of a learner and of an engine: no Megatron-core, no vLLM.

The weights lie as they do there: one parameter a fused linear and expert on the learner, q, k and v interleaved by
group; one matrix for all experts of a layer in the engine. Everything that sends and loads is the run's own code.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mxdist.config import Config
from mxdist.learner.export import Exporter
from mxdist.messages import Transport, WeightPayload
from mxdist.model.hf_tensors import HfTensor
from mxdist.model.linear_names import matrix_name, parts_of
from mxdist.model.quantised_weight import QuantisedWeight, requantise
from mxdist.model.recipes import ModelRecipes, model_recipes
from mxdist.model.shape import ModelShape
from mxdist.quant.tensor import MXTensor
from mxdist.rollout.live_weight import LiveWeight
from mxdist.rollout.loading import WeightLoader
from mxdist.rollout.slot import Slot
from mxdist.sync.outgoing import Outgoing
from mxdist.sync.payload import PartSums

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def device_here() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def shape_of(config: Config) -> ModelShape:
    assert config.model.vocab_size is not None
    return ModelShape(config.model, config.model.vocab_size, None, (0,), 0)


class Linear(QuantisedWeight, nn.Module):
    """A weight that is sent; nothing is multiplied with it."""

    def __init__(self, name: str, weight: Tensor, recipes: ModelRecipes) -> None:
        nn.Module.__init__(self)
        self.name, self.weight = name, nn.Parameter(weight, requires_grad=False)
        self.recipe = recipes.shared(parts_of(name))

    def _prepare(self, quantised: MXTensor) -> Tensor:
        # On a CPU the values are compared beside the bytes; a GPU's products have forms of their own.
        return quantised.dequantise(self.weight.dtype) if self.weight.device.type == "cpu" else self.weight.detach()


class LearnerSide:
    """The one rank of a learner: random weights, quantised as after an optimizer step."""

    def __init__(self, config: Config) -> None:
        torch.set_num_threads(1)
        self._recipes, self._shape, self._device = model_recipes(config), shape_of(config), device_here()
        self._dtype = DTYPES[config.model.dtype]
        self._model = nn.ModuleDict()
        self.tensors = list(self._make_tensors())
        outgoing = Outgoing(self._device, "learner rank 0", config.rollout.max_lag + 1)
        self._exporter = Exporter(lambda: self.tensors, self.tensors, None, outgoing)
        self._parameters = list({id(tensor.parameter): tensor.parameter for tensor in self.tensors}.values())
        self._masters: list[Tensor] = []  # float32, as an optimizer holds them
        self.step(0)

    def step(self, seed: int, rate: float | None = None) -> None:
        """New weights everywhere; with a learning rate the old ones, moved by it up or down as by Adam's first step."""
        torch.manual_seed(seed)
        with torch.no_grad():
            if rate is None:
                for tensor in self.tensors:
                    for rows in tensor.rows:
                        tensor.parameter[rows].normal_(1.0 if "norm" in tensor.name else 0.0, 0.02)
            else:
                self._masters = self._masters or [parameter.float() for parameter in self._parameters]
                for parameter, master in zip(self._parameters, self._masters, strict=True):
                    master += rate * torch.randn_like(master).sign()
                    parameter.copy_(master)
        requantise(self._model)
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def export(self, version: int, transport: Transport = "host") -> WeightPayload:
        return self._exporter.export(self._recipes, version, transport)

    def export_again(self, version: int) -> WeightPayload:
        return self._exporter.again(version)

    def sizes(self) -> dict[str, int]:
        """Numbers and bytes sent, of quantised and of other tensors."""
        sizes = dict.fromkeys(("numbers", "quantised_numbers", "bytes", "quantised_bytes"), 0)
        for tensor in self.tensors:
            numbers = torch.Size(tensor.shape).numel()
            sizes["numbers"] += numbers
            if tensor.module is None:
                sizes["bytes"] += numbers * self._dtype.itemsize
            else:
                packed = tensor.module.packed()
                nbytes = packed.nbytes * numbers // tensor.parameter_size
                sizes["quantised_numbers"] += numbers
                sizes["quantised_bytes"] += nbytes
                sizes["bytes"] += nbytes
        return sizes

    def _make_tensors(self) -> Iterator[HfTensor]:
        linears: dict[str, list[tuple[str, int]]] = {}
        for name, size in self._shape.tensor_shapes().items():
            if name.endswith("_proj.weight"):
                linears.setdefault(matrix_name(name.removesuffix(".weight")), []).append((name, size[0]))
                width = size[1]
            else:
                yield HfTensor(name, self._parameter(size), (slice(0, size[0]),))
                continue
            matrix = matrix_name(name.removesuffix(".weight"))
            if len(linears[matrix]) == len(parts_of(matrix)):
                yield from self._fused(matrix, width, sorted(linears[matrix], key=lambda one: _order(matrix, one[0])))

    def _fused(self, matrix: str, width: int, parts: list[tuple[str, int]]) -> Iterator[HfTensor]:
        linear = Linear(matrix, self._parameter((sum(size for _, size in parts), width)).data, self._recipes)
        self._model[matrix.replace(".", "/")] = linear
        groups = self._shape.config.num_key_value_heads if matrix.endswith("qkv_proj") else 1
        stride, first = sum(size for _, size in parts) // groups, 0
        for name, size in parts:
            each = size // groups
            rows = tuple(slice(start + first, start + first + each) for start in range(0, groups * stride, stride))
            yield HfTensor(name, linear.weight, rows, linear, ".experts." in name)
            first += each

    def _parameter(self, size: tuple[int, ...]) -> nn.Parameter:
        return nn.Parameter(torch.empty(size, dtype=self._dtype, device=self._device), requires_grad=False)


class EngineSide:
    """The weights of an engine."""

    def __init__(self, config: Config) -> None:
        torch.set_num_threads(1)
        self._recipes, self._shape = model_recipes(config), shape_of(config)
        self._dtype = DTYPES[config.model.dtype]
        device = device_here()
        with device:
            self.slots = {slot.name: slot for slot in self._make_slots()}
        self.loader = WeightLoader(self.slots, self._recipes, device)

    def load_weights(self, payloads: list[WeightPayload]) -> PartSums:
        return self.loader.take(self.loader.checked(payloads))

    def checksums(self) -> dict[str, dict[str, int]]:
        """Of the live weights, tensor by tensor."""
        return {name: slot.checksums() for name, slot in self.slots.items()}

    def _make_slots(self) -> Iterator[Slot]:
        shapes = self._shape.tensor_shapes()
        for name, size in shapes.items():
            if len(size) == 1:
                norm = nn.RMSNorm(size[0], dtype=self._dtype)
                yield Slot(name, norm, slice(0, size[0]))
            elif not name.endswith("_proj.weight"):
                yield Slot(name, LiveWeight(size[0], size[1], None, self._dtype), slice(0, size[0]))
        for rows in self._matrices().values():
            operand = self._recipes.of(rows[0].removesuffix(".weight")).w
            live = LiveWeight(sum(shapes[name][0] for name in rows), shapes[rows[0]][1], operand, self._dtype)
            start = 0
            for name in rows:
                yield Slot(name, live, slice(start, start + shapes[name][0]))
                start += shapes[name][0]

    def _matrices(self) -> dict[str, list[str]]:
        """The tensors of each live matrix, in the order of its rows."""
        found: dict[str, list[str]] = {}
        names = [name for name in self._shape.tensor_shapes() if name.endswith("_proj.weight")]
        for name in names:
            before, experts, behind = name.partition(".experts.")
            key = before + experts + behind.partition(".")[2] if experts else name
            found.setdefault(matrix_name(key.removesuffix(".weight")), []).append(name)
        for matrix, rows in found.items():
            if matrix.endswith("qkv_proj"):
                rows.sort(key=lambda name: _order(matrix, name))
        return found


def _order(matrix: str, name: str) -> int:
    return [part.rpartition(".")[2] for part in parts_of(matrix)].index(name.removesuffix(".weight").rpartition(".")[2])
