"""A map of features in two dimensions."""

import numpy as np
from jaxtyping import Float

from sop_jax.evaluation import tsne

LEAST = 10  # images in a map by t-SNE; fewer are placed by their principal components


def feature_map(
    vectors: Float[np.ndarray, "n D"], seed: int = 0
) -> tuple[Float[np.ndarray, "n 2"], str]:
    """Returns the positions of images, and the name of the method that placed them.

    Args:
        vectors: features of any norm, of at least two images.
        seed: of t-SNE.
    """
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    if len(vectors) < LEAST:
        from sklearn.decomposition import PCA  # takes a second, as in `components`

        return PCA(2, svd_solver="full").fit_transform(unit), "principal components"
    settings = tsne.settings()
    settings.perplexity = min(settings.perplexity, (len(vectors) - 1) / 3)
    return tsne.embed(unit, settings, seed)[0], "t-SNE"
