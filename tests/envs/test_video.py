import imageio.v2 as imageio
import numpy as np
import pytest

from vla_trqam.envs.video import BAND_HEIGHT, write_side_by_side


def clip(values, height=64, width=96):
    return [np.full((height, width, 3), v, np.uint8) for v in values]


def write(path, base, tuned):
    write_side_by_side(
        path, base, tuned, base_label="base: failed", tuned_label="tuned: success", fps=10
    )
    return np.stack(list(imageio.get_reader(path).iter_data()))


def test_video_has_the_longer_clips_frames_base_left_tuned_right(tmp_path):
    frames = write(tmp_path / "pair.mp4", clip([50, 50, 200]), clip([100] * 5))
    assert frames.shape == (5, 64 + BAND_HEIGHT, 192, 3)
    left, right = frames[:, BAND_HEIGHT + 4 :, 4:92], frames[:, BAND_HEIGHT + 4 :, 100:]
    np.testing.assert_allclose(left.mean(axis=(1, 2, 3)), [50, 50, 200, 200, 200], atol=6)
    np.testing.assert_allclose(right.mean(axis=(1, 2, 3)), 100, atol=6)


def test_labels_are_drawn_over_both_halves(tmp_path):
    band = write(tmp_path / "pair.mp4", clip([0]), clip([0]))[0, :BAND_HEIGHT]
    assert band[:, :96].max() > 128
    assert band[:, 96:].max() > 128


def test_odd_sizes_are_padded(tmp_path):
    frames = write(tmp_path / "odd.mp4", clip([9], 33, 41), clip([9], 33, 41))
    assert frames.shape == (1, 58, 82, 3)


def test_nothing_else_is_left_in_the_folder(tmp_path):
    write(tmp_path / "pair.mp4", clip([1]), clip([2]))
    assert [p.name for p in tmp_path.iterdir()] == ["pair.mp4"]


def test_empty_or_unequal_clips_are_refused(tmp_path):
    with pytest.raises(ValueError, match="both clips"):
        write(tmp_path / "a.mp4", [], clip([1]))
    with pytest.raises(ValueError, match="both clips"):
        write(tmp_path / "a.mp4", clip([1]), clip([1], width=50))
    with pytest.raises(ValueError, match="mp4"):
        write(tmp_path / "a.avi", clip([1]), clip([1]))
    assert not list(tmp_path.iterdir())
