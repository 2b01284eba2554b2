"""What goes to the Hub, without a trainer and without a Hub."""

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from bare_run import bare_run
from conftest import chat_tokenizer

from trl_toolgrpo import HubPushError
from trl_toolgrpo.hub import push
from trl_toolgrpo.hub.push import HubPublisher


TOKENIZER = chat_tokenizer()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A publisher whose trainer saves one file; `hub.sent` lists the uploads, `hub.answers` what becomes of them."""
    run = bare_run(tmp_path / "run", TOKENIZER, hub_token="of-the-hub-9", hub_strategy="checkpoint")
    trainer, sent, answers = run._trainer, [], []

    def upload_folder(**given):
        sent.append((given["path_in_repo"], sorted(path.name for path in Path(given["folder_path"]).iterdir())))
        if answers:
            raise answers.pop(0)
        return Future() if given["run_as_future"] else SimpleNamespace(oid="1")

    def save_model(_internal_call):
        folder = Path(run.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("model.safetensors", "training_args.bin"):
            (folder / name).write_text("x")

    trainer.hub_model_id, trainer.save_model = "me/run", save_model
    trainer.create_model_card = lambda **kwargs: (Path(run.args.output_dir) / "README.md").write_text("trl_toolgrpo")
    trainer._finish_current_push = lambda: None
    monkeypatch.setattr(push, "hf_api", lambda: SimpleNamespace(upload_folder=upload_folder))
    log = SimpleNamespace(owns_folder=lambda: True)
    records = SimpleNamespace(log=log, redacted=lambda text: text.replace("of-the-hub-9", "[secret]"))
    publisher = HubPublisher(run, None, records, SimpleNamespace(continues_folder=False), None)
    trainer.push_to_hub = lambda message, blocking: publisher.push(message, blocking, None, None, None, {})
    publisher.sent, publisher.answers, publisher.trainer = sent, answers, trainer
    return publisher


def test_the_model_and_its_card_are_pushed(hub, tmp_path):
    assert hub.push("done", True, None, None, None, {}).oid == "1"
    assert hub.sent == [(".", ["README.md", "model.safetensors"])], "no pickle"
    assert (tmp_path / "run" / "hub" / "model.safetensors").is_file()


def test_a_refused_push_says_where_the_work_is(hub, tmp_path):
    hub.answers.append(ConnectionError("of-the-hub-9 is not known"))
    with pytest.raises(HubPushError, match=r"\[secret\] is not known.*Nothing is lost") as refused:
        hub.push("done", True, None, None, None, {})
    assert f"hf upload me/run {tmp_path / 'run' / 'hub'} ." in refused.value.remedy


def test_a_checkpoint_is_kept_until_it_is_uploaded(hub, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    hub.push_checkpoint(str(checkpoint))
    assert [place for place, _ in hub.sent] == [".", "last-checkpoint"] and hub.uploading == {checkpoint}
    hub.push_checkpoint(str(tmp_path / "run" / "checkpoint-2"))
    assert len(hub.sent) == 2, "the push before is still under way"
    hub._upload[1].set_result(None)
    assert hub.uploading == set()


def test_a_run_goes_on_where_a_push_is_refused(hub, tmp_path, caplog):
    hub.answers += [ConnectionError("no network"), ValueError("a bug")]
    hub.push_checkpoint(str(tmp_path / "run" / "checkpoint-1"))
    assert "no network" in caplog.text and "The run goes on." in caplog.text and hub.uploading == set()
    with pytest.raises(ValueError, match="a bug"):
        hub.push_checkpoint(str(tmp_path / "run" / "checkpoint-1"))


def test_a_repository_that_is_refused_is_logged(hub, monkeypatch, caplog):
    def refuse(error):
        def create_repository(token, private):
            raise error

        return create_repository

    hub._run.create_repository = refuse(ConnectionError("of-the-hub-9 may not"))
    hub.create_repository()
    assert "The Hub did not take the repository: ConnectionError: [secret] may not." in caplog.text
    hub._run.create_repository = refuse(ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        hub.create_repository()
