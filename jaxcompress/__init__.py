"""Smaller and faster neural networks in JAX.

Pruning, quantization, low-rank factorization and distillation as composable Optax gradient
transformations and jit-compiled pytree functions. Start with `prune`, `quantize`, `low_rank`
or `cluster`; join them with `chain`; use them once with `compress`, or in training with
`projected` and `straight_through`; end with `pack` and `save`.
"""

from jaxcompress import arrays as arrays
from jaxcompress import distillation as distillation
from jaxcompress import export as export
from jaxcompress import factorization as factorization
from jaxcompress import projections as projections
from jaxcompress import pruning as pruning
from jaxcompress import quantization as quantization
from jaxcompress import report as report
from jaxcompress import schedules as schedules
from jaxcompress import search as search
from jaxcompress import solvers as solvers
from jaxcompress import tracing as tracing
from jaxcompress import tree as tree
from jaxcompress.arrays import todense as todense
from jaxcompress.distillation import distill as distill
from jaxcompress.distillation import kd_loss as kd_loss
from jaxcompress.distillation import mse_logits as mse_logits
from jaxcompress.distillation import soft_cross_entropy as soft_cross_entropy
from jaxcompress.export import load as load
from jaxcompress.export import save as save
from jaxcompress.factorization import low_rank as low_rank
from jaxcompress.factorization import low_rank_factors as low_rank_factors
from jaxcompress.projections import Projection as Projection
from jaxcompress.projections import Reparametrization as Reparametrization
from jaxcompress.projections import alternated as alternated
from jaxcompress.projections import batch_axes as batch_axes
from jaxcompress.projections import chain as chain
from jaxcompress.projections import every as every
from jaxcompress.projections import latent as latent
from jaxcompress.projections import masked as masked
from jaxcompress.projections import pack as pack
from jaxcompress.projections import partition as partition
from jaxcompress.projections import project_params as project_params
from jaxcompress.projections import projected as projected
from jaxcompress.projections import proximal as proximal
from jaxcompress.projections import relaxed as relaxed
from jaxcompress.projections import reparametrized as reparametrized
from jaxcompress.projections import restricted as restricted
from jaxcompress.projections import scheduled as scheduled
from jaxcompress.projections import straight_through as straight_through
from jaxcompress.projections import structure as structure
from jaxcompress.pruning import dependencies as dependencies
from jaxcompress.pruning import prune as prune
from jaxcompress.pruning import select as select
from jaxcompress.pruning import shrink as shrink
from jaxcompress.pruning import shrink_like as shrink_like
from jaxcompress.quantization import cluster as cluster
from jaxcompress.quantization import quantize as quantize
from jaxcompress.report import summary as summary
from jaxcompress.search import sweep as sweep
from jaxcompress.solvers import compress as compress
from jaxcompress.tracing import calibrate as calibrate
from jaxcompress.tracing import capture as capture
from jaxcompress.tracing import capture_names as capture_names
from jaxcompress.tracing import cost as cost
from jaxcompress.tracing import functional as functional
from jaxcompress.tracing import lift as lift
from jaxcompress.tracing import name as name
from jaxcompress.tracing import observers as observers
from jaxcompress.tracing import quantize_activations as quantize_activations
from jaxcompress.tracing import sites as sites

__version__ = "0.1.0"
