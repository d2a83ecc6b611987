"""Pruning: which weights live."""

from jaxcompress.pruning._masks import Mask as Mask
from jaxcompress.pruning._nm import keep_n_of_m as keep_n_of_m
from jaxcompress.pruning._prune import prune as prune
from jaxcompress.pruning._select import largest as largest
from jaxcompress.pruning._select import largest_of_tree as largest_of_tree
