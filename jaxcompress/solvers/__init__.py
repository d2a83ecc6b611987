"""Maths that several techniques share: projecting a layer in the space of its outputs."""

from jaxcompress.solvers._bias import correct_bias as correct_bias
from jaxcompress.solvers._compensate import compensate as compensate
from jaxcompress.solvers._compress import compress as compress
from jaxcompress.solvers._hessian import Prepared as Prepared
from jaxcompress.solvers._hessian import PrepareInfo as PrepareInfo
from jaxcompress.solvers._hessian import prepare as prepare
from jaxcompress.solvers._inputs import Inputs as Inputs
from jaxcompress.solvers._inputs import inputs_of as inputs_of
from jaxcompress.solvers._inputs import mean_inputs as mean_inputs
from jaxcompress.solvers._inputs import with_statistics as with_statistics
from jaxcompress.solvers._layout import Layout as Layout
from jaxcompress.solvers._layout import gram_of as gram_of
from jaxcompress.solvers._layout import layouts as layouts
from jaxcompress.solvers._refit import refit as refit
from jaxcompress.solvers._sensitivities import sensitivities as sensitivities
from jaxcompress.solvers._sequential import sequential as sequential
from jaxcompress.solvers._surgeon import RemovalTrace as RemovalTrace
from jaxcompress.solvers._surgeon import Surgery as Surgery
from jaxcompress.solvers._surgeon import removal_trace as removal_trace
from jaxcompress.solvers._surgeon import surgeon as surgeon
