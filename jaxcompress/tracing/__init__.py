"""Reading any JAX function: what consumes which parameter, and running it otherwise.

A function is traced to a jaxpr by public API. A *site* is an equation that consumes a
parameter leaf, named by the leaf's path. On sites stand `lift` (compressed leaves),
`capture` (values inside), `calibrate` (statistics of activations), `quantize_activations`
and `cost`. Nothing is patched and no state is kept between calls.
"""

from jaxcompress.tracing import observers as observers
from jaxcompress.tracing._activations import quantize_activations as quantize_activations
from jaxcompress.tracing._calibrate import Statistics as Statistics
from jaxcompress.tracing._calibrate import calibrate as calibrate
from jaxcompress.tracing._capture import capture as capture
from jaxcompress.tracing._capture import capture_names as capture_names
from jaxcompress.tracing._cost import Cost as Cost
from jaxcompress.tracing._cost import LeafCost as LeafCost
from jaxcompress.tracing._cost import cost as cost
from jaxcompress.tracing._lift import lift as lift
from jaxcompress.tracing._names import name as name
from jaxcompress.tracing._nnx import functional as functional
from jaxcompress.tracing._nnx import with_variables as with_variables
from jaxcompress.tracing._resized import resized as resized
from jaxcompress.tracing._sites import Site as Site
from jaxcompress.tracing._sites import sites as sites
from jaxcompress.tracing._streams import Member as Member
from jaxcompress.tracing._streams import Stream as Stream
from jaxcompress.tracing._streams import streams as streams
