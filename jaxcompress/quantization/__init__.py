r"""Quantization: which values weights may take.

The numerics of integer grids, exactly as they are computed, all in float32:

===============  ===============================================================================
range            [low, high], low at most 0, high at least 0, of the finite weights of a run,
                 times `clip`. A run: the weights that share a step (`axis`, `group_size`,
                 `blocks`); a last one that is shorter has a step of its own
symmetric        :math:`q = 2^{b-1} - 1`, :math:`\Delta = \max(-low, high) / q`, :math:`z = 0`,
                 codes :math:`c = \mathrm{clip}(\lfloor w/\Delta \rceil, -q, q)`
asymmetric       :math:`\Delta = (high - low) / (2^b - 1)`,
                 :math:`z = \mathrm{clip}(\lfloor -low/\Delta \rceil, 0, 2^b - 1)`,
                 :math:`c = \mathrm{clip}(\lfloor w/\Delta \rceil + z, 0, 2^b - 1)`
one bit          symmetric: :math:`c = \mathrm{sign}(w)`, :math:`\Delta` the mean of
                 :math:`|w|` over :math:`w \ne 0`, times `clip`; zeros stay zero
value            :math:`\hat w = (c - z)\,\Delta`, cast to the dtype of the leaf
rounding         to the nearest, half to even; :math:`w/\Delta` is the product of w with the
                 rounded :math:`1/\Delta`, so that codes are the same eagerly, under `jit`,
                 `vmap` and `grad`
steps            float32, at least the smallest normal float32; of a run of zeros 1
zero points      integers, stored in 8 bits
special values   NaN stays NaN, an infinite weight goes to the end of the range
===============  ===============================================================================

A convention changes the following, with :math:`q = 2^{b-1} - 1`:

==========  ============================  ==================  ===========  ===================
convention  symmetric step                symmetric codes     z is added   smallest step
==========  ============================  ==================  ===========  ===================
`OURS`      :math:`\max|w| / q`           -q to q             after        2^-126
`QWIX`      :math:`\max|w| / (q + 1/2)`   -q - 1 to q         before       2^-63, then 1
`TORCHAO`   :math:`\max|w| / (q + 1/2)`   -q - 1 to q         after        2^-126
`AQT`       :math:`\max|w| / (q + 1/2)`   -q to q             after        2^-126
==========  ============================  ==================  ===========  ===================

`OURS` has the largest weight on a grid point. With the other three it lies half a step from
the last one, on a rounding tie, which the last bit of the step decides.

Narrow floats and tables (`floats`, `fp8`, `mx`, `nvfp4`, `nf4`):

===============  ===============================================================================
value            :math:`\hat w = v\,s`, or :math:`v\,(s\,s_2)` with twice quantized scales
rounding         :math:`w\,(1/s)` to the nearest value of the format, half to the even code (of
                 a table: to the smaller value), beyond the ends to the last finite one
scale            :math:`s = \mathrm{clip} \max|w| / v_{\max}`, from 2^-126 to 2^126; of a run of
                 zeros 1
`E8M0` scales    :math:`\log_2 s = \lfloor\log_2(\mathrm{clip} \max|w|)\rfloor -
                 \lfloor\log_2 v_{\max}\rfloor`
`E4M3` scales    :math:`s_2 = \max s / 448`, :math:`s / s_2` to the nearest, at least 2^-9
codes            of a float its bits, sign first; of a table the index into its sorted values
===============  ===============================================================================
"""

from jaxcompress.quantization._adaround import adaround as adaround
from jaxcompress.quantization._cluster import Centroids as Centroids
from jaxcompress.quantization._cluster import cluster as cluster
from jaxcompress.quantization._codebook import Shared as Shared
from jaxcompress.quantization._codebook import learned_codebook as learned_codebook
from jaxcompress.quantization._conventions import AQT as AQT
from jaxcompress.quantization._conventions import OURS as OURS
from jaxcompress.quantization._conventions import QWIX as QWIX
from jaxcompress.quantization._conventions import TORCHAO as TORCHAO
from jaxcompress.quantization._conventions import Convention as Convention
from jaxcompress.quantization._equalize import equalize as equalize
from jaxcompress.quantization._fake import fake_quantize as fake_quantize
from jaxcompress.quantization._features import Moved as Moved
from jaxcompress.quantization._float_grid import FloatGrid as FloatGrid
from jaxcompress.quantization._floats import floats as floats
from jaxcompress.quantization._floats import fp8 as fp8
from jaxcompress.quantization._floats import mx as mx
from jaxcompress.quantization._floats import nf4 as nf4
from jaxcompress.quantization._floats import nvfp4 as nvfp4
from jaxcompress.quantization._formats import E2M1 as E2M1
from jaxcompress.quantization._formats import E2M3 as E2M3
from jaxcompress.quantization._formats import E3M2 as E3M2
from jaxcompress.quantization._formats import E4M3 as E4M3
from jaxcompress.quantization._formats import E5M2 as E5M2
from jaxcompress.quantization._formats import E8M0 as E8M0
from jaxcompress.quantization._formats import NF4 as NF4
from jaxcompress.quantization._formats import Format as Format
from jaxcompress.quantization._formats import table as table
from jaxcompress.quantization._grid import Grid as Grid
from jaxcompress.quantization._hqq import OffsetGrid as OffsetGrid
from jaxcompress.quantization._hqq import hqq as hqq
from jaxcompress.quantization._interop import from_qwix as from_qwix
from jaxcompress.quantization._interop import to_qwix as to_qwix
from jaxcompress.quantization._latents import label_latents as label_latents
from jaxcompress.quantization._latents import pack_latents as pack_latents
from jaxcompress.quantization._learned import Stepped as Stepped
from jaxcompress.quantization._learned import learned_steps as learned_steps
from jaxcompress.quantization._learned import lsq as lsq
from jaxcompress.quantization._migrate import awq as awq
from jaxcompress.quantization._migrate import smoothed as smoothed
from jaxcompress.quantization._pact import RoundGradientsState as RoundGradientsState
from jaxcompress.quantization._pact import dorefa as dorefa
from jaxcompress.quantization._pact import pact as pact
from jaxcompress.quantization._pact import round_backward as round_backward
from jaxcompress.quantization._pact import round_gradients as round_gradients
from jaxcompress.quantization._proximal import Annealed as Annealed
from jaxcompress.quantization._proximal import parq as parq
from jaxcompress.quantization._proximal import piecewise_affine as piecewise_affine
from jaxcompress.quantization._quantize import quantize as quantize
from jaxcompress.quantization._ranges import absmax as absmax
from jaxcompress.quantization._ranges import min_max as min_max
from jaxcompress.quantization._ranges import mse as mse
from jaxcompress.quantization._ranges import percentile as percentile
from jaxcompress.quantization._rescale import rescaled as rescaled
from jaxcompress.quantization._rotate import rotated as rotated
from jaxcompress.quantization._rotate_streams import rotate_streams as rotate_streams
from jaxcompress.quantization._stochastic import Stochastic as Stochastic
from jaxcompress.quantization._stochastic import stochastic as stochastic
