"""The autoencoder's gate: what loses nothing passes, what blurs mouths away or was never trained does not."""

import jax
import numpy as np
from scipy import ndimage

from configs import demo
from kavatar_jax.cascade.command import DEMO
from kavatar_jax.checkpoint.weights import save_component
from kavatar_jax.models import vae
from kavatar_jax.models.vae import scatter
from tools import gate, mouths


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
    for words in ([str(tmp_path / "nowhere")], [str(tmp_path), "--frames", "10"]):
        assert gate.main(words) == 2 and capsys.readouterr().err.startswith("gate: ")
    assert np.isfinite(gate.measure(gate.open_autoencoder(tmp_path), 3, 9)["psnr"])


def test_channels_that_change_within_a_latent_tell_more_of_mouths(capsys):
    params, config = gate.read_autoencoder(DEMO)
    shares = mouths.mouth_shares(params, config, clips=4, frames=17, size=128)
    kernel = np.asarray(params["decoder"]["bypass"]["kernel"], np.float32)
    frames = np.asarray(scatter(kernel[:, None, None, None], config, starts=False))  # of each channel alone
    quick = frames.var(axis=1).mean(axis=(1, 2, 3)) / np.square(frames).mean(axis=(1, 2, 3, 4))
    assert shares[quick > 0.5].mean() > 1.3 * shares[quick < 0.1].mean() and shares.min() > 0
    for words in (["nowhere"], [str(DEMO), "--clips", "0"], [str(DEMO), "--frames", "10"]):
        assert mouths.main(words) == 2 and capsys.readouterr().err.startswith("mouths: ")
