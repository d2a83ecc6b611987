"""Low-rank factorization: how many directions a weight has."""

from jaxcompress.factorization._adapters import adapter_mask as adapter_mask
from jaxcompress.factorization._adapters import add_adapters as add_adapters
from jaxcompress.factorization._adapters import join_adapters as join_adapters
from jaxcompress.factorization._adapters import merge_adapters as merge_adapters
from jaxcompress.factorization._adapters import split_adapters as split_adapters
from jaxcompress.factorization._basis import Basis as Basis
from jaxcompress.factorization._budget import RankAllocation as RankAllocation
from jaxcompress.factorization._budget import allocate_ranks as allocate_ranks
from jaxcompress.factorization._convolution import convolution as convolution
from jaxcompress.factorization._correction import Correction as Correction
from jaxcompress.factorization._decompose import SVD as SVD
from jaxcompress.factorization._decompose import svd as svd
from jaxcompress.factorization._dynamical import DynamicalState as DynamicalState
from jaxcompress.factorization._dynamical import dynamical_low_rank as dynamical_low_rank
from jaxcompress.factorization._galore import GaloreState as GaloreState
from jaxcompress.factorization._galore import galore as galore
from jaxcompress.factorization._importance import measured_importance as measured_importance
from jaxcompress.factorization._integrator import DynamicalFactors as DynamicalFactors
from jaxcompress.factorization._lora import lora as lora
from jaxcompress.factorization._noise_ranks import evbmf_rank as evbmf_rank
from jaxcompress.factorization._noise_ranks import gavish_donoho_rank as gavish_donoho_rank
from jaxcompress.factorization._plus import low_rank_plus as low_rank_plus
from jaxcompress.factorization._proximal import nuclear_norm as nuclear_norm
from jaxcompress.factorization._proximal import (
    singular_value_hard_threshold as singular_value_hard_threshold,
)
from jaxcompress.factorization._ranks import effective_rank as effective_rank
from jaxcompress.factorization._ranks import energy_rank as energy_rank
from jaxcompress.factorization._ranks import numerical_rank as numerical_rank
from jaxcompress.factorization._ranks import stable_rank as stable_rank
from jaxcompress.factorization._refit import refit_factors as refit_factors
from jaxcompress.factorization._regularizers import nuclear_norm_penalty as nuclear_norm_penalty
from jaxcompress.factorization._regularizers import orthogonality_penalty as orthogonality_penalty
from jaxcompress.factorization._regularizers import spectral_norm_penalty as spectral_norm_penalty
from jaxcompress.factorization._robust import RobustPCA as RobustPCA
from jaxcompress.factorization._robust import robust_pca as robust_pca
from jaxcompress.factorization._scheme_table import SchemeChoice as SchemeChoice
from jaxcompress.factorization._scheme_table import SchemeFit as SchemeFit
from jaxcompress.factorization._scheme_table import convolution_schemes as convolution_schemes
from jaxcompress.factorization._slice import Sliced as Sliced
from jaxcompress.factorization._slice import SlicedStream as SlicedStream
from jaxcompress.factorization._slice import slice_streams as slice_streams
from jaxcompress.factorization._spectra import budgeted_ranks as budgeted_ranks
from jaxcompress.factorization._spectra import spectra as spectra
from jaxcompress.factorization._svd import low_rank as low_rank
from jaxcompress.factorization._training import low_rank_factors as low_rank_factors
from jaxcompress.factorization._weighted import WeightedSVD as WeightedSVD
from jaxcompress.factorization._weighted import weighted_svd as weighted_svd
