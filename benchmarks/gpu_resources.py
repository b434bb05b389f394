"""What the Triton kernels become on an H200 (sm_90), found without one: compiled, disassembled, counted.

    python benchmarks/gpu_resources.py             # registers, spills, shared memory, loops; ways to unpack codes
    python benchmarks/gpu_resources.py --json      # the same for a program, one line a kernel
    python benchmarks/gpu_resources.py --predict   # benchmarks/gpu_predicted.md and .jsonl: see gpu_predicted.py

Launches are caught before they reach a device, and what they would launch is compiled by the ptxas in triton's wheel.
`cycles` are those of a warp that has a multiprocessor to itself: stalls as the assembler wrote them into instructions,
and waits for loads, shuffles and barriers at the latencies in LATENCY, which are assumed. Nothing is measured on a GPU.
"""
# ruff: noqa: N803  (Triton's language: sizes that are compiled in are in capitals)

import argparse
import ast
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from gpu_timing import header, line
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from sparse_attention_decoder.kernels import Coded, Statistics
from sparse_attention_decoder.kernels.triton.append import append
from sparse_attention_decoder.kernels.triton.attend import launch_attend
from sparse_attention_decoder.kernels.triton.codes import load_codes, planes
from sparse_attention_decoder.kernels.triton.score import launch_score
from sparse_attention_decoder.kernels.triton.select import launch_select
from sparse_attention_decoder.kernels.triton.shapes import (
    NEAR_TILE,
    SELECT_TILE,
    Plan,
    Scratch,
    Shape,
)

MULTIPROCESSORS, REGISTERS, SHARED, WARPS = 132, 65536, 227 << 10, 64
SINKS = 4
TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
    torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
# assumed cycles until a result is there; global loads as from the L2, which holds all but codes and keys
LATENCY = {
    "LDG": 270, "LDGSTS": 270, "ATOMG": 400, "LDS": 30, "LDSM": 33, "ATOMS": 60, "SHFL": 25, "MUFU": 24, "IMMA": 33,
    "HMMA": 33, "S2R": 40, "LDC": 40, "POPC": 24, "STG": 0, "STS": 0, "STSM": 0, "LDGDEPBAR": 0, "RED": 0,
}  # fmt: skip
OTHERS, BARRIER, FENCE = 20, 30, 500
# functions that read the same few words over and over: from the L1
REREADING, NEAREST = ("place_of",), 35
# instructions a multiprocessor starts a clock, of all warps: 128, 64, 16 and 32 lanes
RATES = {"issue": 4.0, "alu": 2.0, "special": 0.5, "memory": 1.0}
PIPES = {
    "alu": "LOP3 SHF IADD3 VIADD LEA ISETP SEL FSEL FSETP FMNMX VIMNMX PRMT I2FP F2FP PLOP3 SGXT IABS P2R R2P",
    "special": "MUFU POPC FLO I2F F2I F2F BREV",
    "memory": "LDS STS LDSM STSM LDG STG LDGSTS SHFL ATOMS ATOMG RED",
}
PIPE = {name: pipe for pipe, names in PIPES.items() for name in names.split()}


@dataclass(frozen=True)
class Loop:
    """A loop as compiled, without the loops in it: instructions a warp and iteration, and how long a lone warp takes.

    tokens: of an iteration of the whole program (blocks of 16 for list_blocks); 0 where it does not go by tokens.
    """

    function: str
    tokens: int
    instructions: int
    cycles: int
    pipes: dict[str, int]


@dataclass(frozen=True)
class Resources:
    """A compiled kernel. `straight` is what runs once: all that is in no loop, both sides of branches included."""

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    warps: int
    instructions: int
    tensor_core: int
    straight: Loop
    # what follows the count of turns: only the last program of a row runs it
    last: Loop
    loops: list[Loop]

    @property
    def resident(self) -> int:
        """Programs that a GPU holds at once."""
        by_registers = REGISTERS // (32 * self.warps * -(-self.registers // 8) * 8)
        return MULTIPROCESSORS * min(by_registers, SHARED // (self.shared_bytes + 1024), WARPS // self.warps, 32)

    def lanes_per_token(self, function: str) -> float:
        """Instructions a token in the longest loop of a function, counted lane by lane."""
        loop = max((loop for loop in self.loops if loop.function == function), key=lambda loop: loop.instructions)
        return loop.instructions * self.warps * 32 / loop.tokens


@dataclass(frozen=True)
class Instruction:
    """Name, arguments and predicate; source file and line; the assembler's stall, result and wait barriers."""

    name: str
    arguments: str
    source: tuple[str, int]
    stall: int
    sets: int
    waits: int


def tool(name: str, *arguments: str) -> str:
    """What a program of triton's wheel prints."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def disassembled(cubin: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in order, and where labels point."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    source, begun = ("", 0), None
    for text in tool("nvdisasm", "-gi", "-hex", "-c", cubin).splitlines():
        if match := re.match(r'\s*//## File "([^"]+)", line (\d+)', text):
            source = match[1], int(match[2])
        elif match := re.match(r"\s*(\.L_x_\d+):", text):
            labels[match[1]] = len(found)
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z0-9]+)(.*?);\s*/\* 0x\w{16} \*/", text):
            begun = match
        elif begun and (match := re.match(r"\s*/\* 0x(\w{16}) \*/", text)):
            # the second word of an instruction holds its schedule: stall, barrier it sets, barriers it waits for
            control = int(match[1], 16) >> 41
            arguments = (begun[1] or "") + begun[3]
            found.append(
                Instruction(begun[2], arguments, source, control & 15, (control >> 5) & 7, (control >> 11) & 63)
            )  # fmt: skip
            begun = None
    return found, labels


def lone_cycles(instructions: list[Instruction], loads: int = LATENCY["LDG"]) -> int:
    """Clocks of a warp that nobody disturbs, one instruction after the other; global loads take `loads`."""
    now, ready = 0, [0] * 6
    for each in instructions:
        now = max([now] + [ready[barrier] for barrier in range(6) if each.waits >> barrier & 1])
        now += {"BAR": BARRIER, "MEMBAR": FENCE}.get(each.name, 0)
        if each.sets < 6:
            taken = loads if each.name == "LDG" else LATENCY.get(each.name, OTHERS)
            ready[each.sets] = max(ready[each.sets], now + taken)
        now += max(1, each.stall)
    return now


def runs(node: ast.AST) -> bool:
    """Whether this is a loop that is one when it runs."""
    return isinstance(node, ast.While) or (isinstance(node, ast.For) and "static_range" not in ast.unparse(node.iter))


@cache
def looping(path: str) -> tuple[tuple[int, int, str, bool], ...]:
    """First line, last line, name of a file's functions that loop when they run; whether loops stand in their loops."""
    found = []
    for node in ast.walk(ast.parse(Path(path).read_text())):
        if isinstance(node, ast.FunctionDef) and (own := [each for each in ast.walk(node) if runs(each)]):
            nested = any(runs(inner) for each in own for inner in ast.walk(each) if inner is not each)
            found.append((node.lineno, node.end_lineno or 0, node.name, nested))
    return tuple(found)


def owner(instructions: list[Instruction]) -> tuple[str, bool]:
    """The function that a loop of these instructions stands in, and whether that has loops in loops."""
    names = Counter(
        (name, nested)
        for each in instructions if re.search("sparse_attention_decoder/kernels|benchmarks", each.source[0])
        for first, last, name, nested in looping(each.source[0]) if first <= each.source[1] <= last
    )  # fmt: skip
    return names.most_common(1)[0][0] if names else ("?", False)


def summary(function: str, tokens: int, instructions: list[Instruction]) -> Loop:
    """Counts of a piece of code."""
    pipes = Counter(PIPE[each.name] for each in instructions if each.name in PIPE)
    cycles = lone_cycles(instructions, NEAREST if function in REREADING else LATENCY["LDG"])
    return Loop(function, tokens, len(instructions), cycles, {"issue": len(instructions), **pipes})


def analysed(name: str, kernel: object, tokens: dict[str, int]) -> Resources:
    """Resources of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        code, labels = disassembled(file.name)
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", tool("cuobjdump", "--dump-resource-usage", file.name)))
    spans = []
    for at, each in enumerate(code):
        target = re.search(r"`\((\.L_x_\d+)\)", each.arguments) if each.name == "BRA" else None
        # the last instruction of a kernel is a branch to itself
        if target and labels[target[1]] < at:
            spans.append(range(labels[target[1]], at + 1))
    loops, inside = [], set()
    # inner ones first: a branch back into another loop, or over one of the same function, is a jump between blocks
    for span in sorted(spans, key=len):
        inner = {at for other in spans if other != span and set(other) <= set(span) for at in other}
        own = [code[at] for at in span if at not in inner]
        function, nested = owner(own)
        crossed = [(name, set(other) <= set(span)) for name, other in loops if set(other) & set(span)]
        if any((name == function and not nested) or not within for name, within in crossed):
            continue
        inside.update(span)
        loops.append((function, span))
    found = []
    for function, span in sorted(loops, key=lambda each: each[1][0]):
        inner = {at for _, other in loops if other != span and set(other) <= set(span) for at in other}
        found.append(summary(function, tokens.get(function, 0), [code[at] for at in span if at not in inner]))
    turn = max((at for at, each in enumerate(code) if each.name == "ATOMG"), default=len(code))
    straight = summary(name, 0, [each for at, each in enumerate(code) if at not in inside and at <= turn])
    last = summary(name, 0, [each for at, each in enumerate(code) if at not in inside and at > turn])
    return Resources(
        name, int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"]), kernel.metadata.shared,
        kernel.metadata.num_warps, len(code), sum(each.name in ("IMMA", "HMMA") for each in code),
        straight, last, found,
    )  # fmt: skip


class Compiler:
    """In the place of a device: compiles for sm_90 what is launched, and keeps it."""

    def __init__(self) -> None:
        self.kernels: list[tuple[str, object]] = []

    def run(self, function: JITFunction, *arguments: object, grid: object, warmup: bool, **options: object) -> None:
        """Take the launch of `function`, specialised as triton's launcher would."""
        signature, constants, attributes = {}, {}, {}
        for at, (parameter, value) in enumerate(zip(function.params, arguments, strict=True)):
            if parameter.is_constexpr or (type(value) is int and value == 1):
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[parameter.name] = "*" + TYPES[value.dtype]
            else:
                wide = isinstance(value, int) and not -(2**31) <= value < 2**31
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i64" if wide else "i32"
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[at,] = [["tt.divisibility", 16]]
        attributes = {at: of for at, of in attributes.items() if signature[function.params[at[0]].name] != "constexpr"}
        source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
        compiled_ = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        self.kernels.append((function.__name__, compiled_))


def compiled(
    query_heads: int = 32, heads: int = 8, dim: int = 128, context: int = 131072, batch: int = 1, top_k: int = 1024,
    window: int = 512, dtype: torch.dtype = torch.bfloat16,
) -> list[Resources]:  # fmt: skip
    """The four kernels of a step, compiled for an H200: score, select, attend, append.

    Raises:
        RuntimeError: this process imported triton under TRITON_INTERPRET, which leaves nothing to compile.
    """
    if not isinstance(unpack_kernel, JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set; compile in a process without it")
    meta, compiler = torch.device("meta"), Compiler()
    keys = torch.empty(batch, heads, context, dim, dtype=dtype, device=meta)
    query = torch.empty(batch, query_heads, dim, dtype=dtype, device=meta)
    mean = torch.empty(batch, heads, dim, device=meta)
    coded, near = Coded.room(context, Statistics(mean, mean)), SINKS + window
    with (
        patch.object(JITFunction, "run", lambda *given, **options: compiler.run(*given, **options)),
        patch.object(Shape, "multiprocessors", MULTIPROCESSORS),
    ):
        shape = Shape.of(query, heads, dim)
        scratch, plan = Scratch(shape, context, near), Plan(Plan.empty(batch, near, meta), batch, near)
        launch_score(shape, query, coded, keys, plan.near, None, None, plan.bounds, scratch, dim**-0.5)
        chosen = scratch.tokens, scratch.counts, scratch.missing
        launch_select(shape, plan.bounds, None, scratch, *chosen, top_k, 0.0)
        tally = torch.empty(shape.rows, 6, dtype=torch.float64, device=meta)
        launch_attend(
            shape, query, keys, keys, plan.near, None, *chosen, plan.bounds, scratch.attended, dim**-0.5, tally
        )
        new = torch.empty(batch, heads, dim, dtype=dtype, device=meta)
        starts, length = plan.bounds[:, 0].contiguous(), torch.empty((), dtype=torch.int64, device=meta)
        append(new, new, keys, keys, coded, length, starts, plan.bounds, plan.near, plan.turn, SINKS, window, 0)
    tokens = {
        "score_share": shape.score_tile, "weigh_kernel": shape.score_tile, "fit": shape.fit_tile,
        "attend_share": shape.attend_tile(dtype.itemsize), "near_mass": NEAR_TILE, "code_span": shape.fit_tile,
        "keep_candidates": SELECT_TILE, "exact_cut": SELECT_TILE,
        "list_chosen": SELECT_TILE, "list_blocks": SELECT_TILE,
    }  # fmt: skip
    return [analysed(name, kernel, tokens) for name, kernel in compiler.kernels]


@triton.jit
def product4(codes, weights, sums):
    """Four bytes by four signed bytes, summed onto `sums`."""
    return tl.inline_asm_elementwise(
        "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, weights, sums], tl.int32, True, 1
    )


@triton.jit
def unpack_kernel(
    codes, weights, out, tiles, W: tl.constexpr, KB: tl.constexpr, G: tl.constexpr, T: tl.constexpr, HOW: tl.constexpr
):
    """Sums of codes times weights and nothing else, in three ways: 0 and 1 through tensor cores, 2 by dp4a."""
    token, head, byte = tl.arange(0, T), tl.arange(0, G), tl.arange(0, KB)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        if HOW == 2:
            sums = tl.zeros((T, G), tl.int32)
            for word in tl.static_range(W):
                at = codes.to(tl.pointer_type(tl.int32)) + (tile * T + token) // 16 * (16 * W) + word * 16 + token % 16
                packed = tl.load(at)
                for plane in tl.static_range(4):
                    own = tl.broadcast_to(((packed >> (2 * plane)) & 0x03030303)[:, None], (T, G))
                    of = tl.load(weights.to(tl.pointer_type(tl.int32)) + (plane * W + word) * G + head)
                    sums = product4(own, tl.broadcast_to(of[None, :], (T, G)), sums)
        else:
            first, second, third, fourth = planes(load_codes(codes, tile * T, tiles * T, T, W, KB, 1), HOW == 0)
            at = weights + byte[:, None] * G + head[None, :]
            ones = tl.dot(first, tl.load(at), out_dtype=tl.int32)
            ones = tl.dot(third, tl.load(at + 2 * KB * G), acc=ones, out_dtype=tl.int32)
            fours = tl.dot(second, tl.load(at + KB * G), out_dtype=tl.int32)
            sums = ones * 4 + tl.dot(fourth, tl.load(at + 3 * KB * G), acc=fours, out_dtype=tl.int32)
        tl.store(out + (tile * T + token)[:, None] * G + head[None, :], sums)


WAYS = ("tensor cores, unpacked 4 bytes an instruction (as built)", "tensor cores, unpacked byte by byte", "dp4a")


def ways_to_unpack() -> dict[str, Resources]:
    """Three ways to the sums of 4 query heads at 128 channels. Tensor cores take 8 heads or nothing."""
    meta, compiler = torch.device("meta"), Compiler()
    codes, weights, out = (
        torch.empty(16, dtype=dtype, device=meta) for dtype in (torch.uint8, torch.int8, torch.int32)
    )
    with patch.dict(TYPES, {torch.int8: "i8"}):
        for how in range(3):
            heads, tile = (4, 512) if how == 2 else (8, 512)
            compiler.run(unpack_kernel, codes, weights, out, 64, 8, 32, heads, tile, how, grid=(1,), warmup=False)
    return {
        way: analysed(way, kernel, {"unpack_kernel": 512})
        for way, (_, kernel) in zip(WAYS, compiler.kernels, strict=True)
    }


def table(found: list[Resources], ways: dict[str, Resources]) -> str:
    """Markdown: kernels, their loops, and the ways to unpack."""
    lines = header(
        "kernel",
        "registers",
        "spilled bytes",
        "shared bytes",
        "warps",
        "instructions",
        "tensor core",
        "programs a GPU holds",
    )
    for of in found:
        lines.append(
            line(
                of.name,
                of.registers,
                of.spill_bytes,
                of.shared_bytes,
                of.warps,
                of.instructions,
                of.tensor_core,
                of.resident,
            )
        )
    lines += [
        "",
        *header("kernel", "code", "instructions a warp", "lane instructions a token", "cycles of a lone warp"),
    ]
    for of in found:
        for name, code in (
            ("once", of.straight),
            ("last program", of.last),
            *((loop.function, loop) for loop in of.loops),
        ):
            each = f"{code.instructions * of.warps * 32 / code.tokens:.0f}" if code.tokens else ""
            lines.append(line(of.name, name, code.instructions, each, code.cycles))
    sums = "sums of codes times weights, 4 query heads, 128 channels"
    lines += ["", *header(sums, "lane instructions a token", "registers")]
    lines += [line(way, round(of.lanes_per_token("unpack_kernel")), of.registers) for way, of in ways.items()]
    return "\n".join(lines)


def main() -> None:
    """Print the tables, JSON, or write the predictions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), metavar=("QUERY", "KV"))
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--context", type=int, default=131072)
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    if options.predict:
        from gpu_predicted import write

        write()
        return
    found = compiled(*options.heads, options.dim, options.context, options.batch)
    if options.json:
        print("\n".join(json.dumps(asdict(of) | {"resident": of.resident}) for of in found))
    else:
        print(table(found, ways_to_unpack()))


if __name__ == "__main__":
    main()
