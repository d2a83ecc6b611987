"""Positions: which entries of which axes of a function have to stay or leave together."""

from jaxcompress.tracing.positions._program import Program as Program
from jaxcompress.tracing.positions._program import program_of as program_of
from jaxcompress.tracing.positions._taken import take_positions as take_positions
from jaxcompress.tracing.positions._units import Kind as Kind
from jaxcompress.tracing.positions._units import Place as Place
from jaxcompress.tracing.positions._units import kinds as kinds
from jaxcompress.tracing.positions._user_rules import AxisRule as AxisRule
from jaxcompress.tracing.positions._without import without_positions as without_positions
