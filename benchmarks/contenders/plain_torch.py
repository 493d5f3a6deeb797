"""A guided step in plain torch without synchronisation, as a careful user writes it: what torch.compile fuses."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..workloads import COMPOSED_SCALES, GRADIENT_SCALE


def combined(predictions: Sequence[Tensor], scales: Sequence[float] = COMPOSED_SCALES) -> Tensor:
    """m = m_0 + sum_k s_k (m_k - m_0); classifier-free guidance with one condition (Ho and Salimans 2022, eq. 6)."""
    guided = predictions[0]
    for scale, prediction in zip(scales, predictions[1:], strict=False):
        guided = guided + scale * (prediction - predictions[0])
    return guided


_written = 0


def step_function(
    coefficients: Mapping[str, float],
    count: int,
    *,
    in_a_tensor: bool,
    gradient: bool = False,
    variance: bool = False,
    noise: bool = False,
    out: bool = False,
) -> tuple[Callable[..., Tensor], list[float]]:
    """A function of its own, of straight lines: the terms whose coefficients are not 0, those of 1 unmultiplied.

    It takes ``row`` (if ``in_a_tensor``, the returned list as one tensor; else numbers stand in the code), ``sample``,
    ``count`` predictions, and of ``gradient``, ``variance``, ``noise`` and ``out`` what is wanted, in this order. It
    computes in float32.
    """
    row: list[float] = []

    def coefficient(column: str) -> str:
        if not in_a_tensor:
            return repr(coefficients[column])
        row.append(coefficients[column])
        return f"row[{len(row) - 1}]"

    def sum_of(terms: Sequence[tuple[str, str]]) -> str:
        there = [(column, values) for column, values in terms if coefficients[column] != 0]
        return " + ".join(v if coefficients[c] == 1 else f"{coefficient(c)} * {v}" for c, v in there)

    predictions = [f"p{k}" for k in range(count)]
    wanted = {"gradient": gradient, "variance": variance, "noise": noise, "out": out}
    names = ["row"] * in_a_tensor + ["sample", *predictions, *(name for name, there in wanted.items() if there)]
    lines = ["x = sample.float()", *(f"{p} = {p}.float()" for p in predictions)]
    result = [("out_sample", "x")]
    if gradient:
        lines.append(f"g = {GRADIENT_SCALE} * gradient.float()")
    if count:
        guided = [f" + {scale} * ({p} - p0)" for scale, p in zip(COMPOSED_SCALES, predictions[1:], strict=False)]
        lines.append(f"m = p0{''.join(guided)}")
        terms = [("x0_sample", "x"), ("x0_pred", "m"), *([("x0_grad", "g")] if gradient else [])]
        scaled = f"{coefficient('x0_scale')} * ({sum_of(terms)})"
        clip = coefficients["clip"]
        lines.append(f"x0 = ({scaled}).clamp({-clip}, {clip})" if clip < float("inf") else f"x0 = {scaled}")
        result = [("out_x0", "x0"), ("out_pred", "m"), *result]
    if variance:
        lines.append(f"v = {coefficient('logvar_base')} + {coefficient('logvar_span')} * variance.float()")
    if gradient:
        result.append(("out_grad", "g"))
        if variance:
            result.append(("out_var_grad", "v.exp() * g"))
    if noise:
        result.append(("out_noise", "(0.5 * v).exp() * noise.float()" if variance else "noise.float()"))
    total = sum_of(result)
    lines.append(f"return out.copy_({total})" if out else f"return ({total}).to(sample.dtype)")
    global _written
    _written += 1
    file = f"<step {_written}>"  # a code object of its own: torch.compile keeps what it compiled by these
    source = "\n".join([f"def step({', '.join(names)}):", *("    " + line for line in lines)]) + "\n"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    scope: dict[str, Any] = {}
    exec(compile(source, file, "exec"), scope)
    function: Callable[..., Tensor] = scope["step"]
    return function, row
