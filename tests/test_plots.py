"""Plots of a training."""

import json

import pytest
import toy_training
from matplotlib.axes import Axes
from toy_training import config

from ddm_training import plots
from ddm_training.train import train

store = toy_training.store  # a fixture


def test_a_store_that_came_later_is_plotted_over_its_steps(tmp_path, monkeypatch):
    rows = [
        {"step": 1, "loss": 1.0},
        {"step": 1, "val": {"rooms": {"depth": 0.3}, "old": {"depth": 0.5}}},
        {"step": 2, "val": {"rooms": {"depth": 0.2}, "new": {"depth": 0.4}}},
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    drawn = {}
    plot = Axes.plot

    def watched(axis, x, y, *style, label=None, **options):
        drawn[label] = (x, y)
        return plot(axis, x, y, *style, label=label, **options)

    monkeypatch.setattr(Axes, "plot", watched)
    plots.plot_training(tmp_path / "curves.png", log)
    assert (drawn["rooms"], drawn["old"], drawn["new"]) == (([1, 2], [0.3, 0.2]), ([1], [0.5]), ([2], [0.4]))
    assert (tmp_path / "curves.png").exists()


@pytest.mark.usefixtures("one_thread")
def test_a_plot_that_fails_does_not_end_a_training(store, tmp_path, monkeypatch, capsys):
    def fail(path, log):
        raise KeyError("rooms")

    monkeypatch.setattr(plots, "plot_training", fail)
    train(config(store, tmp_path, max_train_steps=1))
    said = capsys.readouterr().err
    assert "curves.png could not be drawn (KeyError: 'rooms')" in said
    assert "finished at step 1" in said
