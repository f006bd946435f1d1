"""Resizes learnt positional embeddings to other grids.

There are three rules. The features of trained weights are only right with the rule of their
training:

- `ibot`: cubic samples at a distance of size / (new_size + 0.1) from each other (iBOT, DINO);
- `size`: cubic samples at a distance of size / new_size (Hugging Face);
- `antialiased`: samples at the same positions as `size`, each averaged over the area that it
  represents, with a slightly softer kernel that ends at the border (timm, DINOv2 with registers).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

OFFSETS = {"ibot": 0.1, "size": 0.0}  # added to the new size
RULES = (*OFFSETS, "antialiased")


def cubic(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Returns Keys' cubic convolution kernel at x; PyTorch's bicubic uses a = -0.75."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resize_matrix(size: int, new_size: int, rule: str) -> np.ndarray:
    """Returns the interpolation weights [new_size, size] of a rule along one axis.

    Positions outside the grid repeat its border, except with `antialiased`, where they do not
    count.
    """
    if rule == "antialiased":
        scale = size / new_size
        centre = (np.arange(new_size)[:, None] + 0.5) * scale - 0.5
        # The kernel that PyTorch and Pillow use for antialiasing.
        matrix = cubic((np.arange(size) - centre) / max(scale, 1.0), a=-0.5)
        return matrix / matrix.sum(1, keepdims=True)
    centre = (np.arange(new_size) + 0.5) * size / (new_size + OFFSETS[rule]) - 0.5
    taps = np.floor(centre).astype(int)[:, None] + np.arange(-1, 3)  # [new_size, 4]
    weights = cubic(centre[:, None] - taps)
    matrix = np.zeros((new_size, size))
    rows = np.broadcast_to(np.arange(new_size)[:, None], taps.shape)
    np.add.at(matrix, (rows, np.clip(taps, 0, size - 1)), weights)
    return matrix


def resize_positions(
    positions: Float[Array, "h w D"], grid: tuple[int, int], rule: str
) -> Float[Array, "new_h new_w D"]:
    """Returns the positional embeddings resized to `grid`, in rows and columns, by one of RULES."""
    if positions.shape[:2] == grid:
        return positions
    down = resize_matrix(positions.shape[0], grid[0], rule).astype(np.float32)
    across = resize_matrix(positions.shape[1], grid[1], rule).astype(np.float32)
    return jnp.einsum(
        "ih,jw,hwd->ijd", down, across, positions, precision=jax.lax.Precision.HIGHEST
    )
