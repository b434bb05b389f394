"""Which page summary may stand in front of the 2-bit sketch, and how many of its pages must be kept?

Reads captures (keys after RoPE and the last 128 queries of a few layers, see capture.py), runs the
flat sketch selection and the same selection restricted to the pages a cheap summary keeps, and
reports the covered attention mass lost, needles lost, and bytes relative to the flat scan.

    python benchmarks/first_stage/pages.py smol_moby.pt smol_code.pt --out smol.jsonl
    python benchmarks/first_stage/pages.py qwen_code.pt --only 'quest|mean' --out qwen.jsonl
"""

import argparse
import itertools
import json
import math
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sparse_attention_decoder.cache.sketch import fit_length
from sparse_attention_decoder.kernels.reference import STEP
from sparse_attention_decoder.kernels.rotation import rotate

SINKS, WINDOW, TAU, FLOOR, FIXED = 4, 256, 3e-5, 32, 512
FRACTIONS = (1 / 64, 1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 5 / 16, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
STEPS = {1: 1.596, 2: 0.9957, 3: 0.586, 4: 0.3352, 8: 0.05}
ALIGN = 128
LAGS = (1, 2, 4, 8, 15)
BUDGETS = (0.25, 0.35, 0.5)


@dataclass
class Context:
    """One layer, KV head and set of queries, with what the flat sketch does on it."""

    name: str
    keys: Tensor  # [M, D] the middle
    query: Tensor  # [G, n, D]
    sample: Tensor  # [S, D] earlier queries of the group
    near: Tensor  # [G, n] log-sum-exp of sinks and window
    scaling: float
    true: Tensor = field(default=None)  # [n, M] group share of attention
    near_share: Tensor = field(default=None)  # [n]
    est: Tensor = field(default=None)  # [n, M] estimated share
    order: Tensor = field(default=None)
    est_sorted: Tensor = field(default=None)
    past: Tensor = field(default=None)  # [lags, n, M/8] max share per 8 tokens at earlier steps
    decoded: Tensor = field(default=None)  # [M, D] keys as the sketch holds them, in key space
    spaces: dict = field(default_factory=dict)

    def space(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [M, D], queries [G, n, D] and constant [G, n, 1]: scaling * key . query + constant = logit."""
        if name not in self.spaces:
            mu = self.keys.mean(0)
            k, q = self.keys - mu, self.query
            constant = (q @ mu).unsqueeze(-1) * self.scaling
            if name == "rot":
                k, q = rotate(k), rotate(q)
            elif name == "pca":
                basis = torch.linalg.eigh(k.T @ k / len(k))[1].flip(-1)
                k, q = k @ basis, q @ basis
            elif name == "klt":
                cq = self.sample.T @ self.sample / len(self.sample)
                cq += 0.01 * cq.diagonal().mean() * torch.eye(len(cq))
                w, v = torch.linalg.eigh(cq)
                root, inverse = (v * w.sqrt()) @ v.T, (v / w.sqrt()) @ v.T
                k, q = k @ root, q @ inverse
                basis = torch.linalg.eigh(k.T @ k / len(k))[1].flip(-1)
                k, q = k @ basis, q @ basis
            self.spaces[name] = (k, q, constant)
        return self.spaces[name]


def sketched(rotated: Tensor, fitted: Tensor) -> Tensor:
    """Rotated keys as the 2-bit sketch gives them back."""
    deviation, mean = torch.std_mean(fitted, dim=0, correction=0)
    z = (rotated - mean) / deviation
    level = (z >= -STEP).float() + (z >= 0).float() + (z >= STEP).float() - 1.5
    factor = z.square().sum(-1, keepdim=True) / (z * level).sum(-1, keepdim=True).clamp_min(1e-20)
    return level * factor.half().float() * deviation + mean


def load(path: str, stride: int, lengths: list[int]) -> list[Context]:
    """Contexts of the last queries (text and copied passage), or of 16 queries below each length."""
    capture = torch.load(path)
    contexts = []
    total = capture["T"]
    for layer, keys in capture["k"].items():
        kv, dim = keys.shape[0], keys.shape[2]
        group = capture["q"][layer].shape[0] // kv
        scaling = dim**-0.5
        sets = [("text", total - 128, 64), ("copy", total - 64, 64)]
        if lengths:
            sets = [(f"T{n}", n // 16 * 16 - 256, 256) for n in lengths if n <= total - 128]
        for kind, begin, span in sets:
            low = SINKS
            high = low + (begin - WINDOW - low) // ALIGN * ALIGN
            end = begin + span
            pos = torch.arange(begin, end) if not lengths else torch.arange(begin + 5, end, 16)
            for head in range(kv):
                k = keys[head].float()
                mine = slice(head * group, (head + 1) * group)
                if lengths:
                    q = capture["qs"][layer][mine].float()[:, pos // 16]
                else:
                    q = capture["q"][layer][mine].float()[:, begin - (total - 128) :][:, :64]
                rotated = sketched(rotate(k[low:high]), rotate(k[low : fit_length(begin)]))
                matrix = rotate(torch.eye(dim))
                logits = (q @ k[:end].T) * scaling
                logits.masked_fill_(torch.arange(end)[None] > pos[:, None], -math.inf)
                far = logits[..., low:high]
                near = torch.cat([logits[..., :low], logits[..., high:]], -1).logsumexp(-1)
                lse = torch.logaddexp(near, far.logsumexp(-1))
                true = (far - lse[..., None]).exp().mean(0)
                near_share = (near - lse).exp().mean(0)
                guess = (q @ (rotated @ matrix.T).T) * scaling
                guess_lse = torch.logaddexp(near, guess.logsumexp(-1))
                est = (guess - guess_lse[..., None]).exp().mean(0)
                at, past = torch.arange(0, len(pos), 2), None
                if not lengths:
                    hot = est.unflatten(-1, (-1, 8)).amax(-1)
                    at = torch.arange(15, 64, stride)
                    past = torch.stack([hot[at - lag] for lag in LAGS])
                c = Context(
                    f"{kind} L{layer} H{head}",
                    k[low:high],
                    q[:, at].contiguous(),
                    capture["qs"][layer][mine].float()[:, : begin // 16].flatten(0, 1),
                    near[:, at],
                    scaling,
                )
                c.true, c.near_share, c.est, c.past = true[at], near_share[at], est[at], past
                c.est_sorted, c.order = c.est.sort(-1, descending=True)
                c.decoded = rotated @ matrix.T
                contexts.append(c)
    return contexts


# ---------------------------------------------------------------- summaries


def quant(x: Tensor, bits: int) -> Tensor:
    """Per channel, uniform levels around the mean of the prompt's pages; no scale per page."""
    if bits >= 16:
        return x
    mean, sd = x.mean(0), x.std(0).clamp_min(1e-9)
    half = 2 ** (bits - 1)
    step = STEPS[bits]
    return ((x - mean) / sd / step).floor().clamp(-half, half - 1).add(0.5) * step * sd + mean


def quant_range(x: Tensor, bits: int) -> Tensor:
    """Uniform between the extremes of the prompt's pages, for numbers of one sign."""
    low, high = x.quantile(0.002, 0), x.quantile(0.998, 0)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-9)
    return ((x - low) / step).round().clamp(0, 2**bits - 1) * step + low


def pages_of(x: Tensor, page: int) -> Tensor:
    """Rows of x, a page at a time."""
    return x.unflatten(0, (-1, page))


def quest(c: Context, page: int, space: str, bits: int, dims: int | None = None, kappa: float = 0.0):
    """Bounds per channel; with dims, the rest is a radius of one byte weighted kappa."""
    k, q, const = c.space(space)
    p = pages_of(k, page)
    d = dims or k.shape[1]
    top, bottom = quant(p.amax(1)[:, :d], bits), quant(p.amin(1)[:, :d], bits)
    s = q[..., :d].clamp_min(0) @ top.T + q[..., :d].clamp_max(0) @ bottom.T
    size = 2 * d * bits / 8
    if dims and kappa:
        rest = p[..., d:].norm(dim=-1).amax(1, keepdim=True)
        s = s + kappa * q[..., d:].norm(dim=-1, keepdim=True) * quant_range(rest, 8).T / math.sqrt(k.shape[1] - d)
        size += 1
    return s * c.scaling + const, size / page


def mean(
    c: Context,
    page: int,
    space: str,
    bits: int,
    spread: str = "",
    kappa: float = 0.0,
    dims: int | None = None,
    spread_bits: int = 4,
):
    """Page mean, plus kappa deviations of the page along the query."""
    k, q, const = c.space(space)
    p = pages_of(k, page)
    d = dims or k.shape[1]
    m = quant(p.mean(1)[:, :d], bits)
    s, size = q[..., :d] @ m.T, d * bits / 8
    residual = p - p.mean(1, keepdim=True)
    if spread == "diag":
        var = quant_range(residual.square().mean(1)[:, :d].sqrt(), spread_bits).square()
        if d < k.shape[1]:
            rest = p[..., d:].square().sum(-1).mean(1, keepdim=True) / (k.shape[1] - d)
            extra = q[..., d:].square().sum(-1, keepdim=True) @ quant_range(rest, 8).T
            size += 1
        else:
            extra = 0
        s = s + kappa * (q[..., :d].square() @ var.T + extra).sqrt()
        size += d * spread_bits / 8
    elif spread == "radius":
        sd = k.std(0)
        radius = quant_range((residual / sd).square().sum(-1).mean(1, keepdim=True).sqrt(), 8) / math.sqrt(k.shape[1])
        s = s + kappa * (q * sd).norm(dim=-1, keepdim=True) * radius.T
        size += 1
    elif spread == "qradius":
        # the page's spread in the metric of the prompt's queries: one number, E_q (q . residual)^2
        cq = c.sample.T @ c.sample / len(c.sample)
        raw = pages_of(c.keys, page)
        raw = raw - raw.mean(1, keepdim=True)
        var = torch.einsum("npd,de,npe->n", raw, cq, raw) / page
        typical = c.sample.square().sum(-1).mean().sqrt()
        s = s + kappa * (c.query.norm(dim=-1, keepdim=True) / typical) * quant_range(var[:, None], 8).sqrt().T
        size += 1
    elif spread == "axis":
        _, sv, v = torch.linalg.svd(residual, full_matrices=False)
        axis = quant(v[:, 0, :d] * sv[:, :1] / math.sqrt(page), spread_bits)
        s = s + kappa * (q[..., :d] @ axis.T).abs()
        size += d * spread_bits / 8
    return s * c.scaling + const, size / page


def reps(
    c: Context,
    page: int,
    count: int,
    bits: int,
    space: str = "raw",
    metric: str = "raw",
    rounds: int = 4,
    dims: int | None = None,
):
    """A few centroids of each page's keys (k-means inside the page); score = the best of them."""
    key = f"reps{page},{count},{metric}"
    k, q, const = c.space(space)
    if key not in c.spaces:
        x, _, _ = c.space(metric)
        x = x / x.std(0) if metric == "raw" else x
        p = pages_of(x, page)
        far = (p - p.mean(1, keepdim=True)).norm(dim=-1)
        chosen = [far.argmax(1)]
        for _ in range(count - 1):
            centres = torch.stack([p[torch.arange(len(p)), i] for i in chosen], 1)
            chosen.append(torch.cdist(p, centres).amin(-1).argmax(1))
        centres = torch.stack([p[torch.arange(len(p)), i] for i in chosen], 1)
        for _ in range(rounds):
            member = torch.nn.functional.one_hot(torch.cdist(p, centres).argmin(-1), count).float()
            centres = member.transpose(1, 2) @ p / member.sum(1).unsqueeze(-1).clamp_min(1)
        c.spaces[key] = member
    member = c.spaces[key]
    p = pages_of(k, page)
    centres = member.transpose(1, 2) @ p / member.sum(1).unsqueeze(-1).clamp_min(1)
    empty = member.sum(1) == 0
    d = dims or k.shape[1]
    m = quant(centres.flatten(0, 1)[:, :d], bits)
    s = (q[..., :d] @ m.T).unflatten(-1, (-1, count)).masked_fill(empty, -math.inf).amax(-1)
    return s * c.scaling + const, count * d * bits / 8 / page


def outlier(
    c: Context, page: int, bits: int, count: int, kappa: float = 0.0, metric: str = "raw", centre: str = "page"
):
    """Page mean (with one-byte radius) and the sketch's own codes of the page's furthest tokens."""
    s, size = mean(c, page, "raw", bits, "qradius" if kappa else "", kappa)
    x, _, _ = c.space(metric)
    x = x / x.std(0) if metric == "raw" else x
    p = pages_of(x, page)
    away = (p - p.mean(1, keepdim=True) if centre == "page" else p).norm(dim=-1).topk(count, -1).indices
    codes = pages_of(c.decoded, page).gather(1, away[..., None].expand(-1, -1, x.shape[1]))
    t = (c.query @ codes.flatten(0, 1).T).unflatten(-1, (-1, count)).amax(-1) * c.scaling
    return torch.maximum(s, t), size + count * (x.shape[1] / 4 + 2) / page


def token(c: Context, unit: int, space: str, dims: int, bits: int, kappa: float = 0.0):
    """The leading channels of every token; the page score is its best token's. kappa weighs what they leave out."""
    k, q, const = c.space(space)
    s, size = q[..., :dims] @ quant(k[:, :dims], bits).T, dims * bits / 8
    if kappa:
        rest = quant_range(k[:, dims:].norm(dim=-1, keepdim=True), 8) / math.sqrt(k.shape[1] - dims)
        s, size = s + kappa * q[..., dims:].norm(dim=-1, keepdim=True) * rest.T, size + 1
    return s.unflatten(-1, (-1, unit)).amax(-1) * c.scaling + const, size


def random_part(c: Context, unit: int, dims: int):
    """The first channels of the rotated sketch itself, with the token's factor left out: a nested code."""
    k, q, const = c.space("rot")
    s = (q[..., :dims] @ quant(k[:, :dims], 2).T) * (k.shape[1] / dims) ** 0.5
    return s.unflatten(-1, (-1, unit)).amax(-1) * c.scaling + const, dims / 4


def token_channels(c: Context, unit: int, space: str, dims: int, bits: int):
    """Channels chosen by the query (SparQ): the largest |q| sd of the group, channel-major codes."""
    k, q, const = c.space(space)
    weight = (q.abs() * k.std(0)).square().sum(0)
    keep = torch.zeros_like(weight).scatter_(1, weight.topk(dims).indices, 1.0)
    s = (q * keep) @ quant(k, bits).T
    return s.unflatten(-1, (-1, unit)).amax(-1) * c.scaling + const, dims * bits / 8


def quest_channels(c: Context, page: int, space: str, dims: int, bits: int):
    """Quest bounds, only the channels that weigh most for this query are read."""
    k, q, const = c.space(space)
    p = pages_of(k, page)
    top, bottom = quant(p.amax(1), bits), quant(p.amin(1), bits)
    weight = (q.abs() * (top - bottom).std(0).add(p.mean(1).std(0))).square().sum(0)
    keep = torch.zeros_like(weight).scatter_(1, weight.topk(dims).indices, 1.0)
    s = (q.clamp_min(0) * keep) @ top.T + (q.clamp_max(0) * keep) @ bottom.T
    return s * c.scaling + const, 2 * dims * bits / 8 / page


def sign(c: Context, unit: int):
    """The sketch's own sign plane and factor."""
    x = rotate(c.keys)
    mu, sd = x.mean(0), x.std(0)
    z = (x - mu) / sd
    level = z.sign()
    factor = z.square().sum(-1, keepdim=True) / (z * level).sum(-1, keepdim=True)
    q = rotate(c.query)
    s = q @ (level * factor * sd + mu).T
    return s.unflatten(-1, (-1, unit)).amax(-1) * c.scaling, x.shape[1] / 8 + 2


def shares(c: Context, logits: Tensor, page: int, how: str) -> Tensor:
    """Log of the page's share of attention [n, pages] from its logit [G, n, pages]."""
    if how == "logit":
        return logits.mean(0)
    z = torch.logaddexp(c.near, logits.logsumexp(-1) + math.log(page) * 0.5)
    p = logits - z.unsqueeze(-1)
    if how == "max":
        return p.amax(0)
    return p.logsumexp(0) - math.log(len(p))


def oracle(c: Context, page: int, total: bool = False):
    """Pages by what the sketch itself would find in them: the best token's share, or all shares above tau."""
    p = c.est.unflatten(-1, (-1, page))
    return (p * (p > TAU)).sum(-1).log() if total else p.amax(-1).log(), 0.0


def reuse(c: Context, page: int, lag: int):
    """Pages by their best token's share at an earlier step's flat scan, read once every lag steps or so."""
    hot = c.past[LAGS.index(lag)].unflatten(-1, (-1, page // 8)).amax(-1)
    return hot.log(), 18.0 / (2 * lag)


def candidates() -> dict:
    """name -> (page, how to share among heads, function of a context: logits [G, n, pages] or log shares, bytes)."""
    out = {}

    def add(name, page, f, *args, **kw):
        out[name] = (page, kw.pop("how", "prob"), lambda c: f(c, page, *args, **kw))

    for p in (1, 2, 4, 8, 16, 32, 64):
        add(f"oracle P{p}", p, oracle)
        add(f"oracle sum P{p}", p, oracle, True)
    # a. bounds
    for p, bits, space in (
        (16, 4, "raw"),
        (16, 4, "rot"),
        (32, 4, "raw"),
        (32, 8, "raw"),
        (32, 8, "rot"),
        (32, 8, "pca"),
        (32, 8, "klt"),
        (64, 8, "raw"),
        (64, 8, "klt"),
        (16, 2, "raw"),
        (16, 2, "rot"),
        (16, 2, "klt"),
    ):
        add(f"quest P{p} {space} {bits}b", p, quest, space, bits)
    for how in ("max", "logit"):
        add(f"quest P32 raw 8b {how}", 32, quest, "raw", 8, how=how)
        add(f"mean P8 klt 16d 4b diag1.5 {how}", 8, mean, "klt", 4, "diag", 1.5, 16, how=how)
    for space, p, d, b in (
        ("klt", 4, 8, 4),
        ("klt", 4, 8, 2),
        ("klt", 8, 8, 4),
        ("klt", 8, 16, 4),
        ("klt", 8, 16, 2),
        ("klt", 16, 16, 4),
        ("klt", 16, 32, 4),
        ("pca", 8, 16, 4),
        ("pca", 8, 8, 4),
    ):
        for kappa in (0.0, 1.0):
            add(f"quest P{p} {space} {d}d {b}b rest{kappa:g}", p, quest, space, b, d, kappa)
        for kappa in (1.0, 1.5, 2.0):
            add(f"mean P{p} {space} {d}d {b}b diag{kappa:g}", p, mean, space, b, "diag", kappa, d, b)
    # b. mean and spread
    for p, b in ((4, 2), (8, 2), (8, 4), (16, 4), (16, 8), (32, 8)):
        for space in ("raw", "rot"):
            add(f"mean P{p} {space} {b}b", p, mean, space, b)
        for kappa in (1.0, 2.0, 3.0):
            add(f"mean P{p} raw {b}b qradius{kappa:g}", p, mean, "raw", b, "qradius", kappa)
        add(f"mean P{p} raw {b}b radius2", p, mean, "raw", b, "radius", 2.0)
    for p, b, sb in ((8, 2, 2), (16, 4, 2), (16, 4, 4), (32, 8, 4)):
        for kappa in (1.5, 2.5):
            add(f"mean P{p} raw {b}b diag{kappa:g} s{sb}", p, mean, "raw", b, "diag", kappa, spread_bits=sb)
        add(f"mean P{p} raw {b}b axis1.5 s{sb}", p, mean, "raw", b, "axis", 1.5, spread_bits=sb)
    for p, b in ((16, 2), (16, 3), (32, 2), (32, 4), (32, 3), (8, 1), (64, 4)):
        for kappa in (1.0, 1.5, 2.0):
            add(f"lean mean P{p} raw {b}b qradius{kappa:g}", p, mean, "raw", b, "qradius", kappa)
        for kappa in (1.0, 2.0):
            add(f"lean mean P{p} raw {b}b radius{kappa:g}", p, mean, "raw", b, "radius", kappa)
    for p, d, b in (
        (16, 32, 2),
        (32, 32, 4),
        (32, 32, 2),
        (8, 8, 2),
        (4, 8, 1),
        (8, 16, 1),
        (16, 16, 2),
        (32, 16, 4),
        (16, 24, 3),
    ):
        for kappa in (1.0, 1.5):
            add(f"lean mean P{p} klt {d}d {b}b diag{kappa:g}", p, mean, "klt", b, "diag", kappa, d, b)
        add(f"lean mean P{p} klt {d}d {b}b qradius1.5", p, mean, "klt", b, "qradius", 1.5, d)
    # c. representatives
    for p, n, b, m in (
        (16, 2, 4, "klt"),
        (16, 4, 2, "klt"),
        (32, 4, 2, "klt"),
        (32, 8, 2, "klt"),
        (16, 4, 2, "raw"),
        (8, 2, 2, "klt"),
    ):
        add(f"reps P{p} n{n} raw {b}b by {m}", p, reps, n, b, "raw", m)
    for p, n, d, b in ((8, 2, 16, 4), (8, 4, 8, 4), (16, 4, 16, 4), (16, 4, 16, 2), (32, 8, 16, 4), (16, 8, 8, 4)):
        add(f"reps P{p} n{n} klt {d}d {b}b", p, reps, n, b, "klt", "klt", 4, d)
    for p, b, n in ((16, 2, 1), (16, 4, 1), (32, 4, 2)):
        add(f"outlier P{p} mean{b}b n{n}", p, outlier, b, n)
        add(f"outlier P{p} mean{b}b n{n} radius2", p, outlier, b, n, 2.0)
        add(f"outlier P{p} mean{b}b n{n} radius2 by klt", p, outlier, b, n, 2.0, "klt")
    # d. a few channels of every token
    for u in (1, 4, 8, 16):
        for space in ("pca", "klt"):
            for d, b in ((4, 4), (6, 4), (8, 4), (8, 3), (8, 2), (16, 2)):
                add(f"token u{u} {space} {d}d {b}b", u, token, space, d, b)
        add(f"token u{u} klt 4d 4b rest1", u, token, "klt", 4, 4, 1.0)
        add(f"token u{u} klt 6d 4b rest1", u, token, "klt", 6, 4, 1.0)
        add(f"sketch part u{u} 16d", u, random_part, 16)
        for space, d, b in (("raw", 16, 2), ("klt", 8, 2), ("klt", 16, 2), ("raw", 8, 4)):
            add(f"channels u{u} {space} {d}d {b}b", u, token_channels, space, d, b)
    for space in ("klt", "pca"):
        for d, b in ((4, 2), (4, 4), (6, 2), (6, 4), (8, 3), (8, 4), (12, 2), (16, 1), (24, 1), (16, 2), (24, 2)):
            add(f"chosen channels u1 {space} {d}d {b}b", 1, token_channels, space, d, b)
    add("chosen channels u2 klt 16d 2b", 2, token_channels, "klt", 16, 2)
    add("chosen channels u2 klt 8d 2b", 2, token_channels, "klt", 8, 2)
    add("sign u1", 1, sign)
    for p, d, b in ((16, 16, 4), (16, 8, 8)):
        add(f"questchan P{p} raw {d}d {b}b", p, quest_channels, "raw", d, b)
    for lag in LAGS:
        add(f"reuse P16 lag{lag}", 16, reuse, lag)
    return out


# ---------------------------------------------------------------- evaluation


def cover(c: Context, kept: Tensor | None, tau: float = TAU) -> dict[str, Tensor]:
    """What the sketch selection covers when only `kept` [n, M] tokens may be chosen."""
    ordered = torch.ones_like(c.order, dtype=torch.bool) if kept is None else kept.gather(1, c.order)
    rank = ordered.to(torch.int32).cumsum(-1)
    by_true = c.true.gather(1, c.order)
    thr = ordered & ((rank <= FLOOR) | (c.est_sorted > tau))
    fixed = ordered & (rank <= FIXED)
    got = {
        "thr": (by_true * thr).sum(-1) + c.near_share,
        "fixed": (by_true * fixed).sum(-1) + c.near_share,
        "read": thr.sum(-1).float(),
    }
    for name, level in (("2", 1e-2), ("3", 1e-3)):
        hot = by_true > level
        got[f"hot{name}"] = hot.sum(-1).float()
        got[f"lost{name}"] = (hot & ~thr).sum(-1).float()
    return got


def evaluate(contexts: list[Context], flat: list[dict], page: int, how: str, f, adaptive: bool) -> list[dict]:
    """Rows of the table: what one summary loses at each fraction of pages kept."""
    scores, size = [], 0.0
    for c in contexts:
        s, size = f(c)
        scores.append(shares(c, s, page, how) if s.dim() == 3 else s)
    flat_bytes = contexts[0].keys.shape[1] / 4 + 2
    rows = []
    for fraction in FRACTIONS:
        if size / flat_bytes + fraction > 0.8 and fraction > 1 / 8:
            continue
        results, kept_share, natural = [], [], []
        cut = None
        if adaptive:
            everything = torch.cat([s.flatten() for s in scores])
            cut = everything.kthvalue(int(len(everything) * (1 - fraction))).values
        for c, s in zip(contexts, scores, strict=False):
            n = max(1, round(s.shape[-1] * fraction))
            if adaptive:
                least = max(1, 64 // page)
                keep = s >= torch.minimum(s.topk(least, -1).values[:, -1:], cut)
            else:
                keep = torch.zeros_like(s, dtype=torch.bool).scatter_(1, s.topk(n, -1).indices, True)
            kept_share.append(keep.float().mean())
            results.append(cover(c, keep.repeat_interleave(page, 1) if page > 1 else keep))
            natural.append(c.name.startswith("text"))
        kept = float(torch.stack(kept_share).mean())
        row = {
            "cut": None if cut is None else float(cut.exp()) / TAU,
            "fraction": fraction,
            "kept": kept,
            "pages": n,
            "summary": size / flat_bytes,
            "ratio": size / flat_bytes + kept,
        }
        for which, mask in (("", [True] * len(natural)), ("_text", natural), ("_copy", [not x for x in natural])):
            pick = [i for i, m in enumerate(mask) if m]
            if not pick:
                continue
            for mode in ("thr", "fixed"):
                loss = torch.cat([flat[i][mode] - results[i][mode] for i in pick])
                row[f"{mode}_loss{which}"] = float(loss.mean())
                row[f"{mode}_p99{which}"] = float(loss.quantile(0.99))
            for name in "23":
                hot = sum(float(flat[i][f"hot{name}"].sum()) for i in pick)
                for tag, source in (("lost", results), ("flatlost", flat)):
                    row[f"{tag}{name}{which}"] = sum(float(source[i][f"lost{name}"].sum()) for i in pick) / max(hot, 1)
            if not which:
                row["read"] = float(torch.cat([r["read"] for r in results]).mean())
        rows.append(row)
    return rows


def at_ratio(rows: list[dict], ratio: float, key: str) -> float:
    """Loss at a total byte ratio, linear between the fractions measured."""
    rows = sorted(rows, key=lambda r: r["ratio"])
    if ratio < rows[0]["ratio"]:
        return math.nan
    for a, b in itertools.pairwise(rows):
        if a["ratio"] <= ratio <= b["ratio"]:
            t = (ratio - a["ratio"]) / max(b["ratio"] - a["ratio"], 1e-9)
            return a[key] + t * (b[key] - a[key])
    return math.nan


def needed(rows: list[dict], limit: float, key: str = "thr_loss", what: str = "ratio") -> float:
    """The smallest byte ratio that keeps the loss within limit."""
    rows = sorted(rows, key=lambda r: r["ratio"])
    for i, row in enumerate(rows):
        if row[key] <= limit:
            if i == 0:
                return row[what]
            last = rows[i - 1]
            t = (last[key] - limit) / max(last[key] - row[key], 1e-12)
            return last[what] + t * (row[what] - last[what])
    return math.nan


def main() -> None:
    """Read the captures, print a table a capture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("captures", nargs="+")
    parser.add_argument("--out", required=True)
    parser.add_argument("--only", default=".")
    parser.add_argument("--stride", type=int, default=8, help="every n-th query")
    parser.add_argument("--lengths", default="", help="contexts to cut the capture to, such as 2000,4000")
    parser.add_argument("--fixed", action="store_true", help="also the same fraction for all heads")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    start = time.time()
    lengths = [int(n) for n in args.lengths.split(",") if n]
    everything = [c for path in args.captures for c in load(path, args.stride, lengths)]
    groups = {f"T{n}": [c for c in everything if c.name.startswith(f"T{n} ")] for n in lengths} or {"all": everything}
    with Path(args.out).open("w") as sink:
        for group, contexts in groups.items():
            flat = [cover(c, None) for c in contexts]
            base = {k: float(torch.cat([r[k] for r in flat]).mean()) for k in ("thr", "fixed", "read")}
            base = {
                "flat_thr": base["thr"],
                "flat_fixed": base["fixed"],
                "flat_read": base["read"],
                "middle": contexts[0].keys.shape[0],
            }
            for tau in (1e-4, 3e-4):
                other = [cover(c, None, tau) for c in contexts]
                base |= {
                    f"{k}_{tau:g}": float(torch.cat([r[n] for r in other]).mean())
                    for k, n in (("flat_thr", "thr"), ("flat_read", "read"))
                }
            print(f"\n## {group}: {len(contexts)} contexts, {base}, {time.time() - start:.0f} s\n", flush=True)
            table = []
            for name, (page, how, f) in candidates().items():
                if not re.search(args.only, name) or (lengths and name.startswith("reuse")):
                    continue
                for adaptive in (True, False) if args.fixed else (True,):
                    rows = evaluate(contexts, flat, page, how, f, adaptive)
                    for row in rows:
                        sink.write(
                            json.dumps(
                                {"group": group, "name": name, "page": page, "adaptive": adaptive, **base, **row}
                            )
                            + "\n"
                        )
                    sink.flush()
                    table.append((name + ("" if adaptive else " fixed f"), rows))
            print(
                "| summary | summary/flat | "
                + " | ".join(f"thr loss @{b}" for b in BUDGETS)
                + " | p99 @.35 | 512 loss @.35 | lost >1e-2 @.35 | lost >1e-3 @.35 | bytes for loss .002 | .005 | .01 |"
            )
            print("|---" * 12 + "|")
            for name, rows in sorted(
                table, key=lambda t: (math.isnan(at_ratio(t[1], 0.35, "thr_loss")), at_ratio(t[1], 0.35, "thr_loss"))
            ):
                cells = [f"{rows[0]['summary']:.3f}"] + [f"{at_ratio(rows, b, 'thr_loss'):.4f}" for b in BUDGETS]
                cells += [f"{at_ratio(rows, 0.35, k):.4f}" for k in ("thr_p99", "fixed_loss", "lost2", "lost3")]
                cells += [f"{needed(rows, limit):.2f}" for limit in (0.002, 0.005, 0.01)]
                print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print(f"{time.time() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
