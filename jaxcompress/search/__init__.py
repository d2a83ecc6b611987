"""Comparing many settings at once."""

from jaxcompress.search._sweep import sweep as sweep
