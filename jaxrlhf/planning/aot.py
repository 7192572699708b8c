# SPDX-License-Identifier: Apache-2.0
"""Ahead-of-time compilation: programs for a TPU slice, compiled where there is no TPU.

A program is a function with the shapes and shardings of its arguments; nothing is allocated. The
compiler is the slice's own (the `libtpu` wheel), so what it says about memory is what it would say
there: an out-of-memory error here is one there. Nothing in this file knows what the programs are.

    mesh = topology_mesh("v5e:2x4", fsdp=4, tensor=2)
    compiled = compile_programs({"step": Program(step, (abstract(state, shardings), ...))})
    print(memory(compiled["step"]))
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jaxrlhf.errors import JaxrlhfError
from jaxrlhf.parallel.mesh import make_mesh

# Without these libtpu asks a metadata server (for minutes) what machine it is on.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A function, jitted already or not, and the ShapeDtypeStructs it is called with.

    A function that donates or states out_shardings must come jitted.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device, as the compiler planned them."""

    arguments: int
    outputs: int  # those not written over arguments
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """All of it at once: arguments, outputs, temporaries and the program itself."""
        return self.arguments + self.outputs + self.temporaries + self.code

    def __str__(self) -> str:
        parts = ("arguments", "outputs", "temporaries")
        each = ", ".join(f"{name} {getattr(self, name) / 2**20:,.0f}" for name in parts)
        return f"{self.total / 2**20:,.0f} MiB per chip ({each})"


def topology_mesh(topology: str, **sizes: int) -> Mesh:
    """A mesh over the chips of a TPU slice that need not exist.

    Args:
        topology: as libtpu names it, "v5e:2x4".
        sizes: of the mesh's axes, see `make_mesh`.

    Raises:
        JaxrlhfError: libtpu is not installed, or knows no such slice.
    """
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise JaxrlhfError(
            f"compiling for {topology} needs the TPU compiler, not a TPU: pip install libtpu"
        )
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # whatever the plugin raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise JaxrlhfError(f"TPU topology {topology!r}: {reason}") from error
    return make_mesh(devices=found.devices, **sizes)


def abstract(tree: Any, shardings: Any) -> Any:
    """Arrays or ShapeDtypeStructs to ShapeDtypeStructs that live where `shardings` says.

    `shardings`: the same tree of shardings, or one for all leaves.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        one = shardings
        shardings = jax.tree.map(lambda _: one, tree)
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings
    )


def compile_programs(programs: Mapping[str, Program]) -> dict[str, Any]:
    """Each program compiled for the devices of its arguments; run it in the scope of their mesh
    (`parallel.rules.use_mesh`, or the models' logical constraints say nothing)."""
    return {name: compile_program(program) for name, program in programs.items()}


def compile_program(program: Program) -> Any:
    """One program compiled: a `jax.stages.Compiled`."""
    function: Any = program.function
    if not hasattr(function, "lower"):
        function = jax.jit(function)
    return function.lower(*program.args, **program.kwargs).compile()


def memory(compiled: Any) -> Memory:
    """What a compiled program occupies on each device."""
    found = compiled.memory_analysis()
    return Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes - found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
    )


_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_ARRAY = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r"([a-z][\w\-]*)\(")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One array that a compiled program computes, as a single device holds it."""

    dtype: str
    shape: tuple[int, ...]
    operation: str  # all-gather, fusion, ...
    name: str
    source: str  # the jax operation it comes from, where the compiler still knows

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of it, without padding."""
        return self.size * _BYTES[self.dtype]

    def __str__(self) -> str:
        shape = ",".join(map(str, self.shape))
        return f"{self.dtype}[{shape}] {self.operation} {self.name} {self.source}".rstrip()


_NOT_COMPUTED = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional")


def buffers(compiled: Any) -> list[Buffer]:
    """Arrays a program computes outside of fusions, largest first.

    What is inside a fusion never reaches memory; arguments, and values that only pass through
    tuples and loops, are left out.
    """
    found: set[Buffer] = set()
    for line in _outside_fusions(compiled.as_text()):
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, rest = match.groups()
        shapes, _, after = _split_type(rest)
        operation = _OPERATION.match(after)
        if operation is None or operation[1] in _NOT_COMPUTED:
            continue
        source = re.search(r'op_name="([^"]*)"', rest)
        for dtype, sizes in _ARRAY.findall(shapes):
            shape = tuple(int(n) for n in sizes.split(",") if n)
            found.add(Buffer(dtype, shape, operation[1], name, source[1] if source else ""))
    return sorted(found, key=lambda b: (-b.nbytes, b.name))


def _split_type(text: str) -> tuple[str, str, str]:
    """The type at the front of an HLO instruction's right-hand side, and what follows."""
    if text.startswith("("):
        depth = 0
        for i, char in enumerate(text):
            depth += (char == "(") - (char == ")")
            if not depth:
                return text[: i + 1], " ", text[i + 1 :].lstrip()
    return text.partition(" ")


def _outside_fusions(text: str) -> Iterator[str]:
    """The lines of computations that are not the body of a fusion (or of a reduction)."""
    called = set(re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", text))
    inside = False
    for line in text.splitlines():
        if line and not line[0].isspace():
            header = re.match(r"(?:ENTRY )?%?([\w.\-]+) ", line)
            inside = line.endswith("{") and header is not None and header[1] in called
        elif not inside:
            yield line


def replicated_leaves(tree: Any, *, at_least: int) -> list[str]:
    """Leaves of at least so many bytes of which every device would hold the whole.

    Args:
        tree: ShapeDtypeStructs or arrays with shardings.
    """
    lines = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        sharding, size = leaf.sharding, math.prod(leaf.shape) * leaf.dtype.itemsize
        if size >= at_least and sharding.num_devices > 1 and sharding.is_fully_replicated:
            lines.append(f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}")
    return lines
