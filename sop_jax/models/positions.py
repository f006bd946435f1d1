"""Resize of learnt positional embeddings to other grids."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def cubic(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys' cubic convolution kernel; PyTorch's bicubic uses a = -0.75."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resize_matrix(size: int, new_size: int) -> np.ndarray:
    """Interpolation weights [new_size, size] of iBOT's and DINO's positional resize.

    They ask for a scale of (new_size + 0.1) / size and sample with that scale, not with
    new_size / size, so features of weights trained there agree only under this rule.
    No antialiasing; positions outside the grid repeat its border.
    """
    centre = (np.arange(new_size) + 0.5) * size / (new_size + 0.1) - 0.5
    taps = np.floor(centre).astype(int)[:, None] + np.arange(-1, 3)  # [new_size, 4]
    weights = cubic(centre[:, None] - taps)
    matrix = np.zeros((new_size, size))
    rows = np.broadcast_to(np.arange(new_size)[:, None], taps.shape)
    np.add.at(matrix, (rows, np.clip(taps, 0, size - 1)), weights)
    return matrix


def resize_positions(
    positions: Float[Array, "h w D"], grid: tuple[int, int]
) -> Float[Array, "new_h new_w D"]:
    """The positional embeddings of another grid (iBOT, `interpolate_pos_encoding`)."""
    if positions.shape[:2] == grid:
        return positions
    down = resize_matrix(positions.shape[0], grid[0]).astype(np.float32)
    across = resize_matrix(positions.shape[1], grid[1]).astype(np.float32)
    return jnp.einsum(
        "ih,jw,hwd->ijd", down, across, positions, precision=jax.lax.Precision.HIGHEST
    )
