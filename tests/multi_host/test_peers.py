"""Several peers in one process, on a store that is a dict: agreement, silence, failure."""

import threading
import time
import types

import pytest

from huatuo_jax.core import distributed
from huatuo_jax.core.distributed import Peers


class Store:
    """What a coordination service's client does with keys."""

    def __init__(self):
        self._values, self._lock = {}, threading.Lock()

    def key_value_set(self, key, value, allow_overwrite):
        assert allow_overwrite
        with self._lock:
            self._values[key] = value

    def key_value_dir_get(self, folder):
        with self._lock:
            return [(key, value) for key, value in self._values.items() if key.startswith(folder)]


class Left(Exception):
    """Stands for the end of the process."""


class LocalPeers(Peers):
    """Peers whose thread ends where the process would."""

    said = None

    def run(self):
        try:
            super().run()
        except Left as left:
            self.said = str(left)

    def _leave(self, reason):
        raise Left(reason)


def peers(count, *, timeout_s=1.0):
    store = Store()
    made = [LocalPeers(store, index=i, count=count, timeout_s=timeout_s) for i in range(count)]
    for one in made:
        one.hosts = [f"host-{index}" for index in range(count)]
    for one in made:
        one.start()
    return made


def end(made):
    for one in made:
        one.publish(finished=True)
    for one in made:
        one.finish()


def test_all_stop_at_the_same_question_however_far_each_is():
    made = peers(4, timeout_s=100.0)
    for index, one in enumerate(made):
        one.interval_s = 0.1  # They beat at different times all the same.
        for _ in range(10 + index):
            assert not one.stop_now()
    made[2].asked = True
    stopped_at = {}

    def ask_until_it_stops(index):
        calls = 10 + index
        while True:
            calls += 1
            if made[index].stop_now():
                break
            time.sleep(0.01 * (index + 1))
        stopped_at[index] = calls

    threads = [threading.Thread(target=ask_until_it_stops, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(stopped_at.values())) == 1 and stopped_at[0] > 13
    assert all(one.stop_now() for one in made)  # And from then on.
    end(made)


def test_nobody_stops_unless_one_was_asked():
    made = peers(2)
    for _ in range(200):
        assert not any(one.stop_now() for one in made)
    time.sleep(3 * made[0].interval_s)
    assert not any(one.stop_now() for one in made)
    end(made)


def test_a_silent_peer_is_named_by_all_others():
    made = peers(3, timeout_s=1.0)
    began = time.monotonic()
    made[1]._over.set()
    made[1].join()
    for one in (made[0], made[2]):
        one.join()
        assert one.said == "process 1 (host host-1) not heard of for 1 s"
    assert time.monotonic() - began >= 1.0


def test_who_waited_for_a_silent_peer_leaves_the_end_to_the_watch():
    one = LocalPeers(Store(), index=0, count=3, timeout_s=1.0)  # Whose watch has not begun.
    one.wait_for_the_silent([1, 2])  # Nothing is known of silence.
    one._silent_s[2] = 0.9
    waiting = threading.Thread(target=one.wait_for_the_silent, args=([1, 2],))
    waiting.start()
    waiting.join(timeout=0.5)
    assert waiting.is_alive()
    one._silent_s[2] = 0.0  # Heard of again.
    waiting.join()


def test_a_peer_that_failed_is_named_with_its_error():
    made = peers(2, timeout_s=50.0)
    made[0].fail("config.sft.batch_size=3 must be even")
    made[1].join()
    assert (
        made[1].said == "process 0 (host host-0) has failed: config.sft.batch_size=3 must be even"
    )
    made[0]._over.set()


def test_a_peer_that_finished_may_be_silent():
    made = peers(2, timeout_s=0.5)
    made[1].publish(finished=True)
    made[1]._over.set()
    made[1].join()
    time.sleep(1.5)
    assert made[0].is_alive() and made[0].said is None
    end(made[:1])


def test_one_process_answers_at_once(tmp_path):
    assert distributed.is_first() and distributed.count() == 1
    assert distributed.gather("x", 3) == [3]
    distributed.barrier("x")
    distributed.check_same("x", {"a": 1})
    distributed.check_shared(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with distributed.first_then_others("x"), distributed.joined():
        pass
    distributed.leave()


def test_of_settings_that_differ_those_alone_are_shown(monkeypatch):
    settings = [{"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 2, "d": 4}}]
    monkeypatch.setattr(distributed, "_run", types.SimpleNamespace(named=str))
    monkeypatch.setattr(distributed, "gather", lambda name, value: settings)
    with pytest.raises(ValueError) as error:
        distributed.check_same("x", settings[0])
    told = 'x differs between [0] and [1]: {"b": {"d": 3}} and {"b": {"d": 4}}'
    assert str(error.value) == told


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HUATUO_MULTI_HOST": "yes"}, "HUATUO_MULTI_HOST='yes' must be auto"),
        ({"JAX_NUM_PROCESSES": "2"}, "is set without JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"}, "without JAX_PROCESS_ID"),
        (
            {"JAX_COORDINATOR_ADDRESS": "a", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            "JAX_COORDINATOR_ADDRESS='a' must be HOST:PORT",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID='2' must be a whole number from 0 to 2 - 1",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "0", "JAX_PROCESS_ID": "0"},
            "JAX_NUM_PROCESSES='0' must be a whole number from 1",
        ),
        (
            {"HUATUO_MULTI_HOST": "auto", "HUATUO_HOST_TIMEOUT_S": "soon"},
            "HUATUO_HOST_TIMEOUT_S='soon' must be a number of seconds",
        ),
    ],
)
def test_a_wrong_environment_is_refused_before_anything_is_joined(
    monkeypatch, environment, message
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.start()


def test_without_a_word_in_the_environment_nothing_is_joined():
    assert distributed._asked_for({"TPU_WORKER_ID": "3", "SLURM_NTASKS": "4"}) is None
    assert distributed._asked_for({"HUATUO_MULTI_HOST": "auto"}) == {}


def test_process_0_stays_until_the_others_are_gone():
    made = peers(3, timeout_s=100.0)
    for one in made:
        one.interval_s = 0.05
    leaving = threading.Thread(target=made[0]._outlast_the_others)
    made[0].publish(gone=True)
    leaving.start()
    made[1].publish(gone=True)
    leaving.join(timeout=0.5)
    assert leaving.is_alive()
    made[2].publish(gone=True)
    leaving.join()
    end(made)
