import subprocess
import sys

import numpy as np
import pytest

from logalign.errors import InputError
from logalign.report import figures


def columns(**more):
    step = np.arange(0, 200, 10)
    lar = 0.5 + step / 1000
    return {
        "step": step,
        "n": np.full(20, 64),
        "lar": lar,
        "lar_vocab_centered": lar - 0.01,
        "lar_token_centered": lar - 0.02,
        "lar_centered": lar - 0.03,
        "effective_dim": 64.0 ** (2 * (1 - lar)),
        "loss": 4.0 - step / 100,
        **more,
    }


def lines(ax):
    return {line.get_label(): line for line in ax.get_lines()}


def test_lar_figure_of_one_run_draws_every_form_as_it_is():
    data = columns()
    (ax,) = figures.lar_figure(data).axes
    drawn = lines(ax)
    assert set(drawn) == {"plain", "vocabulary-centered", "token-centered", "centered (both)"}
    np.testing.assert_array_equal(drawn["plain"].get_xdata(), data["step"])
    np.testing.assert_array_equal(drawn["centered (both)"].get_ydata(), data["lar_centered"])


def test_lar_figure_of_several_runs_has_a_panel_for_each_form_and_one_color_a_run():
    plain, centered = figures.lar_figure(columns(), columns(), labels=["clean", "noisy"]).axes
    assert list(lines(plain)) == list(lines(centered)) == ["clean", "noisy"]
    assert (
        lines(plain)["noisy"].get_color() == lines(centered)["noisy"].get_color() != lines(plain)["clean"].get_color()
    )


def test_lar_figure_of_runs_without_centered_readings_has_one_panel():
    plain = {name: values for name, values in columns().items() if name in ("step", "lar")}
    assert len(figures.lar_figure(plain, plain).axes) == 1


def test_undefined_lar_is_a_gap_and_is_marked():
    lar = columns()["lar"].copy()
    lar[5] = np.nan
    (ax,) = figures.lar_figure(columns(lar=lar)).axes
    drawn = lines(ax)
    assert np.isnan(drawn["plain"].get_ydata()[5])
    np.testing.assert_array_equal(drawn["undefined reading"].get_xdata(), [50])


def test_rarely_recorded_loss_is_a_line_through_its_points():
    val_loss = np.full(20, np.nan)
    val_loss[::5] = [4.0, 3.0, 2.0, 2.5]
    (ax,) = figures.loss_figure(columns(val_loss=val_loss)).axes
    np.testing.assert_array_equal(lines(ax)["held-out"].get_xdata(), [0, 50, 100, 150])
    np.testing.assert_array_equal(lines(ax)["held-out"].get_ydata(), [4.0, 3.0, 2.0, 2.5])


def test_effective_dimension_is_on_a_log_axis_and_its_centered_form_follows_from_centered_lar():
    data = columns()
    (ax,) = figures.effective_dim_figure(data).axes
    assert ax.get_yscale() == "log"
    np.testing.assert_allclose(
        lines(ax)["centered (both)"].get_ydata(), 64.0 ** (2 * (1 - data["lar_centered"])), rtol=1e-12
    )


def test_figures_of_what_was_not_recorded_are_none():
    data = columns(loss=np.full(20, np.nan))
    assert figures.loss_figure(data) is None
    assert figures.drivers_figure(data) is None


def test_drivers_figure_draws_spectral_readings():
    sparse = np.where(np.arange(20) % 5 == 0, 12.0, np.nan)
    data = columns(weight_participation=sparse, input_participation=sparse / 2, coherence=sparse / 24)
    weight, inputs, coherence = figures.drivers_figure(data).axes
    assert [len(ax.get_lines()[0].get_xdata()) for ax in (weight, inputs, coherence)] == [4, 4, 4]
    assert coherence.get_lines()[0].get_ydata()[0] == 0.5


def test_panels_share_their_steps():
    figure, (top, bottom) = figures.new_axes(2)
    top.set_xlim(3, 30)
    assert bottom.get_xlim() == (3, 30)
    assert bottom.get_xlabel() == "step"
    assert figure.axes == [top, bottom]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: figures.lar_figure(), "at least one run; got none"),
        (lambda: figures.lar_figure(columns(), labels=["a", "b"]), "got 2 labels for 1 runs"),
        (lambda: figures.new_axes(0), "got rows=0"),
    ],
)
def test_errors_say_what_was_found(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("name", ["$x_1$ and $", "_hidden", "two\nlines", "x" * 200, "50 % <b>"])
def test_any_run_name_can_be_drawn_and_is_in_the_legend(name):
    figure = figures.lar_figure(columns(), columns(), labels=[name, "other"])
    figure.canvas.draw()
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert len(texts) == 2
    assert max(map(len, texts)) < 80


def test_colors_are_distinct():
    assert len(set(figures.COLORS.values())) == len(figures.COLORS) == 8
    assert len(set(figures.RUN_COLORS)) == len(figures.RUN_COLORS)


def test_drawing_leaves_matplotlib_as_it_was():
    code = (
        "import sys, matplotlib, numpy as np\n"
        "before = repr(matplotlib.rcParams.copy())\n"
        "from logalign.report import figures\n"
        "figures.lar_figure({'step': np.arange(3), 'lar': np.array([0.5, 0.6, 0.7])})\n"
        "assert repr(matplotlib.rcParams.copy()) == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
