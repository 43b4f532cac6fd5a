"""Commands clear away what they wrote themselves, and nothing that somebody else put in the same place."""

import pytest

from training.codebook.figures import write_results
from training.demo.image import write_training_folder
from training.demo.launcher import clear_run


def test_the_demo_refuses_folders_of_others(tmp_path):
    for name, write in (("tissue", write_training_folder), ("run", clear_run)):
        theirs = tmp_path / name / "holiday.jpg"
        theirs.parent.mkdir()
        theirs.write_text("theirs")
        with pytest.raises(SystemExit, match="that no demo wrote"):
            write(theirs.parent)
        assert theirs.read_text() == "theirs"
    (tmp_path / "run/settings.json").write_text("{}")
    clear_run(tmp_path / "run")
    clear_run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_analysis_deletes_figures_of_an_earlier_one_alone(tmp_path, monkeypatch):
    for name in ("spectra", "distances", "usage", "training", "spectra_over_training"):
        monkeypatch.setattr(f"training.codebook.figures.draw_{name}", lambda *_: None)
    (tmp_path / "training.png").write_text("theirs")
    write_results(tmp_path, [], None)
    assert (tmp_path / "training.png").is_file()
    write_results(tmp_path, [], None)  # now codebook.json tells that the figures are its own
    assert not (tmp_path / "training.png").exists()


@pytest.mark.slow
def test_a_checkpoint_with_files_of_others_is_not_rotated_away(make_trainer, tmp_path, caplog):
    trainer = make_trainer(max_steps=3, save_every=1, keep_checkpoints=1)
    finish = trainer.store._finish

    def with_notes(partial, final):
        finish(partial, final)
        if final.name == "step-00000001":
            (final / "notes.txt").write_text("theirs")

    trainer.store._finish = with_notes
    trainer.train()
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000001", "step-00000003"]
    assert "it holds notes.txt" in caplog.text
