"""Schedules of a number over steps: sparsity, bits, strength, temperature."""

from jaxcompress.schedules._ramps import cosine as cosine
from jaxcompress.schedules._ramps import cubic as cubic
from jaxcompress.schedules._ramps import exponential as exponential
from jaxcompress.schedules._ramps import linear as linear
