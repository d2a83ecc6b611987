"""Quantization: which values weights may take."""

from jaxcompress.quantization._cluster import Centroids as Centroids
from jaxcompress.quantization._cluster import cluster as cluster
from jaxcompress.quantization._grid import Grid as Grid
from jaxcompress.quantization._quantize import quantize as quantize
