"""What a compression did: tables for the terminal, figures for notebooks and papers."""

from jaxcompress.report._figures import figure as figure
from jaxcompress.report._figures import tradeoff as tradeoff
from jaxcompress.report._masks import masks as masks
from jaxcompress.report._panels import histograms as histograms
from jaxcompress.report._panels import spectra as spectra
from jaxcompress.report._quantization import Quantization as Quantization
from jaxcompress.report._quantization import QuantizedLeaf as QuantizedLeaf
from jaxcompress.report._quantization import QuantizedSite as QuantizedSite
from jaxcompress.report._quantization import quantization as quantization
from jaxcompress.report._rank_figure import rank_figure as rank_figure
from jaxcompress.report._ranks import RankRow as RankRow
from jaxcompress.report._ranks import Ranks as Ranks
from jaxcompress.report._ranks import ranks as ranks
from jaxcompress.report._summary import LeafRow as LeafRow
from jaxcompress.report._summary import Summary as Summary
from jaxcompress.report._summary import summary as summary
from jaxcompress.report._table import table as table
