"""Streaming statistics of activations, and ranges chosen on histograms.

Each is an `Observer`: a state that batches are added to and that merges with those of other
batches, shards and processes, and what it says at the end. Ranges go to
`jc.quantize_activations` and `jc.lift`.
"""

from jaxcompress.tracing._histogram import Histogram as Histogram
from jaxcompress.tracing._histogram import entropy as entropy
from jaxcompress.tracing._histogram import entropy_range as entropy_range
from jaxcompress.tracing._histogram import histogram as histogram
from jaxcompress.tracing._histogram import mse as mse
from jaxcompress.tracing._histogram import mse_range as mse_range
from jaxcompress.tracing._histogram import percentile as percentile
from jaxcompress.tracing._histogram import percentile_range as percentile_range
from jaxcompress.tracing._observers import Gram as Gram
from jaxcompress.tracing._observers import Moments as Moments
from jaxcompress.tracing._observers import Observer as Observer
from jaxcompress.tracing._observers import Range as Range
from jaxcompress.tracing._observers import absmax as absmax
from jaxcompress.tracing._observers import gram as gram
from jaxcompress.tracing._observers import mean_variance as mean_variance
from jaxcompress.tracing._observers import min_max as min_max
from jaxcompress.tracing._observers import moving_average as moving_average
from jaxcompress.tracing._observers import together as together
