"""A run directory in a store that speaks S3's protocol: moto, on this machine.

pip install "moto[server]" s3fs; without them these tests are skipped.
"""

import importlib.util
import json
import urllib.request

import pytest

from mosaic_jax.cli import launch
from mosaic_jax.core import errors
from mosaic_jax.run import lease, mirror
from tests.end_to_end.test_mirror import config

MISSING = [name for name in ("moto", "s3fs") if not importlib.util.find_spec(name)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}"),
]
URL = "s3://bucket/a/run"


@pytest.fixture
def s3(monkeypatch, tmp_path):
    """A store with the bucket "bucket"; its objects by a client of its own."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "XDG_CACHE_HOME": str(tmp_path / "one"),
    }.items():
        monkeypatch.setenv(name, value)
    # Clients of other tests have their endpoint and keys.
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield client
    s3fs.S3FileSystem.clear_instance_cache()
    # All servers of a process have the same objects.
    urllib.request.urlopen(f"{address}/moto-api/reset", data=b"").close()
    server.stop()


def objects(client):
    """Size of every object, by its name below the run directory."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="bucket")
    found = [one for page in pages for one in page.get("Contents", [])]
    return {one["Key"].removeprefix("a/run/"): one["Size"] for one in found}


def sizes(folder):
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_a_study_goes_on_elsewhere(s3, tmp_path, monkeypatch, capsys):
    assert launch.run(config(), URL) == 0
    (folder,) = tmp_path.glob("one/mosaic_jax/stores/*/0/run")
    there = objects(s3)
    held = s3.get_object(Bucket="bucket", Key="a/run/.lock")["Body"].read()
    assert len(held) == there.pop(".lock") and json.loads(held)["released"]
    assert there == sizes(folder)
    assert not [name for name in there if "checkpoints" in name]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    capsys.readouterr()
    assert launch.run(config(), URL) == 0
    told = capsys.readouterr().err
    assert f"fetched {len(there)} files" in told
    assert "init: reused from" in told and "init: running" not in told
    assert launch.run(config(), tmp_path / "other", reuse_from=[URL]) == 0
    assert "init: running" not in capsys.readouterr().err


def test_one_at_a_time(s3, tmp_path, monkeypatch):
    with mirror.opened(URL) as (folder, copy):
        (folder / "config.json").write_text("{}")
        copy.saved()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
        with pytest.raises(errors.ConfigError, match="in use by process"):
            with mirror.opened(URL):
                pass
    with mirror.opened(URL) as (other, _):
        assert (other / "config.json").read_text() == "{}"
    assert objects(s3).keys() == {"config.json", lease.NAME}


def refused(capsys, url):
    assert launch.run(config(), url) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and url in line
    return line


def test_what_is_refused_is_one_line_before_any_work(s3, monkeypatch, capsys):
    told = refused(capsys, "s3://another/run")
    assert "bucket" in told
    s3.put_object(Bucket="bucket", Key="b/photo.png", Body=b"mine")
    assert "holds something else" in refused(capsys, "s3://bucket/b")
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3fs.S3FileSystem.clear_instance_cache()
    assert "credentials" in refused(capsys, URL).lower()
