"""The quantization report as a table of rich, and as text."""

import math
from typing import Any

from jaxcompress.report._leaves import require
from jaxcompress.report._quantization import Quantization
from jaxcompress.report._table import BLANK, human_bytes, path_name, plain_console, printed


def table(made: Quantization) -> Any:
    """A `rich.table.Table`: one row per leaf, one more for each further site of it."""
    require("quantization", "rich")
    from rich import box
    from rich.table import Table
    from rich.text import Text

    total = made.total
    rows = Table(box=box.SIMPLE, show_footer=True, padding=(0, 1, 0, 0))
    footers = ("total", "", "", _bits(total.bits), human_bytes(total.nbytes), _snr(total.snr))
    names = ("leaf", "shape", "stored as", "bits", "bytes", "SNR", "site", "activations")
    for name, footer in zip(names, (*footers, "", ""), strict=True):
        left = name in ("leaf", "stored as", "site", "activations")
        rows.add_column(
            Text(name),
            footer=Text(footer),
            justify="left" if left else "right",
            no_wrap=name not in ("leaf", "stored as"),
            overflow="fold",
            style="cyan" if name == "leaf" else "",
            footer_style="bold",
        )
    for leaf in made.leaves:
        sites = [site for site in made.sites if leaf.path in site.path.split(" + ")]
        shape = "×".join(map(str, leaf.shape or ())) or "scalar"
        facts = (
            path_name(leaf.path),
            shape,
            leaf.rule,
            _bits(leaf.bits),
            human_bytes(leaf.nbytes),
            _snr(leaf.snr),
        )
        first = (sites[0].op, sites[0].activations) if sites else ("", "")
        rows.add_row(*map(Text, (*facts, *first)))
        for site in sites[1:]:
            rows.add_row(*[""] * 6, Text(site.op), Text(site.activations))
    return rows


def text(made: Quantization) -> str:
    """The table as plain text, at most 120 wide, and which sites are left in float."""
    require("quantization", "rich")
    left = ", ".join(made.floating) or "no site"
    return f"{printed(plain_console(), table(made))}\nleft in float: {left}"


def _bits(bits: float) -> str:
    return f"{bits:.2f}".rstrip("0").rstrip(".")


def _snr(snr: float | None) -> str:
    if snr is None:
        return BLANK
    return "exact" if snr == math.inf else f"{snr:.1f} dB"
