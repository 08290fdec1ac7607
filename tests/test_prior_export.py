"""A prior folder's card, and its way to the Hugging Face hub."""

import pytest
import toy_training
import yaml
from toy_training import config

from ddm_training.checkpoints import list_checkpoints
from ddm_training.errors import InputError
from ddm_training.export import card_license, model_card
from ddm_training.rgbd import RgbdSpec
from ddm_training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
store = toy_training.store  # a fixture


@pytest.mark.parametrize(
    ("text", "head"),
    [
        ("unknown", {"license": "unknown"}),
        ("CC-BY-4.0", {"license": "cc-by-4.0"}),
        ("Apache 2.0", {"license": "apache-2.0"}),
        ("CC BY-NC: see [Hypersim] #1", {"license": "other", "license_name": "cc-by-nc-see-hypersim-1"}),
        ("1.0", {"license": "other", "license_name": "1.0"}),
        ("", {"license": "unknown"}),
    ],
)
def test_the_head_of_a_card_names_any_licence(text, head):
    assert yaml.safe_load(card_license(text)) == head


@pytest.mark.parametrize("sheet", [True, False])
def test_a_card_speaks_of_the_sheet_only_where_there_is_one(sheet):
    settings = {
        "preset": "tiny", "loss_type": "l2", "learning_rate": 1e-3, "mixed_precision": "no",
        "depth_loss_weight": 3.0, "timestep_bias": 0.5, "prediction_type": "epsilon",
    }  # fmt: skip
    card = model_card(RgbdSpec(license="my: own"), config=settings, parameters=1, measured={}, sheet=sheet)
    assert ("samples.png" in card) is sheet
    head = yaml.safe_load(card.split("---")[1])
    assert (head["license"], head["license_name"]) == ("other", "my-own")
    assert "| licence of the weights | my: own |" in card


class Hub:
    """Stands for `HfApi`: what was asked of it, and what it refuses."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.refused: str | None = None

    def __call__(self) -> "Hub":
        return self

    def _answer(self, name: str) -> None:
        if name == self.refused:
            raise OSError("401 Unauthorized\nRequest id 7")
        self.asked.append(name)

    def whoami(self) -> None:
        self._answer("whoami")

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self._answer(f"create {repo_id}")

    def upload_folder(self, *, folder_path: str, repo_id: str, commit_message: str) -> None:
        self._answer(f"upload {folder_path} {repo_id}")


@pytest.fixture
def hub(monkeypatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    return hub


@pytest.mark.parametrize("refused", ["whoami", "create me/prior"])
def test_a_training_that_could_not_be_uploaded_does_not_begin(store, tmp_path, hub, refused):
    hub.refused = refused
    with pytest.raises(InputError, match=r"does not let me/prior be written \(401 Unauthorized\).*hf auth login"):
        train(config(store, tmp_path / "run", push_to_hub=True, hub_model_id="me/prior"))
    assert not (tmp_path / "run").exists()


def test_an_upload_that_fails_is_made_by_the_same_command(store, tmp_path, hub):
    pushed = config(store, tmp_path, max_train_steps=1, push_to_hub=True, hub_model_id="me/prior")
    upload = f"upload {tmp_path / 'prior'} me/prior"
    hub.refused = upload
    with pytest.raises(InputError, match=r"could not be uploaded \(401 Unauthorized\).*whole in .*prior: run the same"):
        train(pushed)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1]
    hub.refused = None
    train(pushed)
    assert hub.asked == ["whoami", "create me/prior", "whoami", "create me/prior", upload]
