"""Low-rank factorization: how many directions a weight has."""

from jaxcompress.factorization._basis import Basis as Basis
from jaxcompress.factorization._decompose import SVD as SVD
from jaxcompress.factorization._decompose import svd as svd
from jaxcompress.factorization._svd import low_rank as low_rank
from jaxcompress.factorization._training import low_rank_factors as low_rank_factors
from jaxcompress.factorization._weighted import WeightedSVD as WeightedSVD
from jaxcompress.factorization._weighted import weighted_svd as weighted_svd
