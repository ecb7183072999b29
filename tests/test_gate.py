"""The autoencoder's gate: what loses nothing passes, what blurs mouths away or was never trained does not."""

import jax
import numpy as np
from scipy import ndimage

from configs import demo
from kavatar_jax.checkpoint.weights import save_component
from kavatar_jax.models import vae
from tools import gate


def test_what_comes_back_is_judged(tmp_path):
    perfect = gate.measure(lambda video: video, 3, 17, tmp_path / "sheet.png")
    assert perfect["pooled"] > 0.95 and perfect["psnr"] > 100 and (tmp_path / "sheet.png").is_file()
    blurred = gate.measure(lambda video: ndimage.gaussian_filter(video, (6, 4, 4, 0)), 3, 17)
    assert blurred["pooled"] < 0.8 and blurred["psnr"] < 30


def test_an_untrained_autoencoder_does_not_pass(tmp_path, capsys):
    config = demo.config().vae
    params = jax.device_get(vae.init(config, jax.random.key(0)))
    save_component(params, config, tmp_path / "vae")
    assert gate.main([str(tmp_path), "--clips", "3", "--frames", "9"]) == 1
    assert "no" in capsys.readouterr().out
    assert gate.main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("gate: ")
    assert np.isfinite(gate.measure(gate.open_autoencoder(tmp_path), 3, 9)["psnr"])
