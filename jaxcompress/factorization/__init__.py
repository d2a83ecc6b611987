"""Low-rank factorization: how many directions a weight has."""

from jaxcompress.factorization._svd import Basis as Basis
from jaxcompress.factorization._svd import low_rank as low_rank
from jaxcompress.factorization._training import low_rank_factors as low_rank_factors
