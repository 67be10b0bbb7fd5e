"""Counts of pieces, gathered by document: what is resampled whole.

Owns the sums. Must not know what pieces are, or what is made of their counts.

Letters after an underscore name the axes: N texts, V pieces, D documents.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

__all__ = ["LEAST_DOCUMENTS", "by_document", "spread"]

LEAST_DOCUMENTS = 10  # that a piece occurs in, to be looked at: resampling fewer says little of an error


def by_document(
    counts_NV: sparse.csr_array, looked_V: NDArray[np.integer], labels_N: NDArray[np.integer], documents_N: NDArray[np.str_]
) -> sparse.csr_array:
    """The uses of the given pieces, and of all others together, in each document: documents x (classes x pieces)."""
    documents, document_N = np.unique(documents_N, return_inverse=True)
    classes = int(labels_N.max()) + 1
    looked_NV = counts_NV[:, looked_V]
    rest_N = counts_NV.sum(axis=1) - looked_NV.sum(axis=1)
    of_N = document_N * classes + labels_N
    shape = (len(documents) * classes, len(of_N))
    members = sparse.csr_array((np.ones(len(of_N)), (of_N, np.arange(len(of_N)))), shape=shape)
    uses = members @ sparse.hstack([looked_NV, sparse.csr_array(rest_N[:, None])], format="csr")
    return sparse.csr_array(uses.reshape(len(documents), -1))


def spread(counts_NV: sparse.csr_array, documents_N: NDArray[np.str_]) -> NDArray[np.integer]:
    """How many documents each piece occurs in."""
    document_N = np.unique(documents_N, return_inverse=True)[1]
    of_N = (np.ones(len(document_N)), (document_N, np.arange(len(document_N))))
    return (sparse.csr_array(of_N) @ counts_NV).count_nonzero(axis=0)
