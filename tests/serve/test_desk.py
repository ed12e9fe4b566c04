"""Jobs on their way: kept on the disk, batched, told of, cancelled, and made again where a worker died."""

import threading
import time

import numpy as np
import pytest
from standin import StandIn

from controlkit.errors import Invalid
from controlkit.sample import EditRequest, Request
from controlkit.serve.desk import Desk
from controlkit.serve.orders import Evaluation, Pictures, order_of
from controlkit.serve.queue import Queue, QueueFull
from controlkit.serve.settings import Limits, Settings

pytest_plugins = "serving"


def order(seed=0, count=1, **values):
    values = {"steps": 2, "prompt": f"picture {seed}"} | values
    return Pictures(request=Request(**values), seeds=tuple((seed + i, 0) for i in range(count)))


def wait(queue, *names):
    for _ in range(1000):
        jobs = [queue.get(name) for name in names]
        if all(job.has_ended for job in jobs):
            return jobs
        time.sleep(0.005)
    raise AssertionError(jobs)


def studio_of(tmp_path, script=None):
    return StandIn(tmp_path / "state" / "pictures", script)


def test_an_order_comes_back_from_its_text():
    for one in (order(3, 2), Evaluation(control="canny")):
        assert order_of(one.to_json()) == one


def test_the_oldest_job_goes_first_and_takes_along_those_that_are_alike(tmp_path):
    queue = Queue(tmp_path, Limits())
    first = queue.add(order(1, 2), "v1")
    other = queue.add(order(2, 1, size=(64, 64)), "v1")
    alike = queue.add(order(9, 14, prompt="x", negative_prompt="y", steps=7, guidance=2.0), "a1111")
    late = queue.add(order(4), "v1")
    assert [job.id for job in queue.take(16)] == [first.id, alike.id], "16 pictures are a batch"
    assert queue.waiting_before(late) == 1
    assert [job.id for job in queue.take(16)] == [other.id], "and none is passed over"
    assert [job.id for job in queue.take(16)] == [late.id] and queue.take(16) == []


def picture_of(height, width):
    return np.zeros((height, width, 3), np.uint8)


def test_a_picture_s_own_shape_decides_what_it_is_made_with():
    def alike(picture, **edit):
        return order(edit=EditRequest(image=picture, **edit)).alike

    mask = {"mask": np.full((8, 8, 3), 255, np.uint8)}
    assert alike(picture_of(32, 32)) == alike(picture_of(32, 32), strength=0.5) != alike(picture_of(32, 48))
    assert alike(picture_of(32, 32)) != alike(picture_of(32, 32), outpaint=(0, 8, 0, 8))
    assert alike(picture_of(32, 32), margin=4, **mask) == "", "of which a part alone is worked on"
    sized = [order(edit=EditRequest(image=picture_of(32, w)), size=(32, 32)).alike for w in (32, 48)]
    assert sized[0] == sized[1]


def test_what_is_interrupted_ends_at_once_and_the_jobs_of_other_apis_go_on(desk_of, tmp_path):
    hold = threading.Event()
    studio = studio_of(tmp_path, lambda orders: hold.wait(2))
    studio.pause = 0.01
    desk = desk_of([studio])
    desk.accept(order(size=(64, 64)), "v1")  # while the others wait, and are one batch
    ours = desk.accept(order(1, steps=30).model_copy(update={"takes_parts": True}), "a1111")
    others = [desk.accept(order(2, steps=30), "v1"), desk.accept(order(3, steps=30), "v1")]
    hold.set()
    while not (at := desk.progress.get(ours.id)) or not at.step:
        time.sleep(0.002)
    assert len(studio.batches[-1]) == 3
    assert desk.interrupt("a1111") == 1 and desk.interrupt("openai") == 0
    [ended] = wait(desk.queue, ours.id)
    assert ended.state == "done" and not ended.result["is_whole"]
    assert desk.queue.get(others[0].id).state == "running"
    assert [job.result["is_whole"] for job in wait(desk.queue, *(one.id for one in others))] == [True, True]


def test_evaluations_are_made_alone(tmp_path):
    queue = Queue(tmp_path, Limits())
    for _ in range(2):
        queue.add(Evaluation(control="canny"), "v1")
    assert len(queue.take(16)) == 1


def test_the_queue_is_bounded(tmp_path):
    queue = Queue(tmp_path, Limits(waiting=2))
    for seed in range(2):
        queue.add(order(seed), "v1")
    with pytest.raises(QueueFull, match="2 jobs wait"):
        queue.add(order(3), "v1")
    few = Queue(tmp_path / "other", Limits(bytes_waiting=100))
    with pytest.raises(QueueFull):
        few.add(order(1), "v1")


def test_accepted_jobs_outlive_the_process(tmp_path):
    queue = Queue(tmp_path, Limits())
    names = [queue.add(order(seed, steps=seed + 1), "v1").id for seed in range(3)]
    queue.take(16)  # and the process is killed
    again = Queue(tmp_path, Limits())
    again.recover()
    assert [job.id for job in again.take(16)] == names[:1], "alone, as it may be at fault"
    third = Queue(tmp_path, Limits())
    third.recover()
    failed = third.get(names[0])
    assert failed.state == "failed" and "died 2 times" in failed.error
    assert [third.take(16)[0].id for _ in range(2)] == names[1:]


def test_a_server_that_ends_is_no_fault_of_the_job_at_work(desk_of, tmp_path):
    studio = studio_of(tmp_path)
    studio.pause = 0.05
    desk = desk_of([studio])
    job = desk.accept(order(steps=100), "v1")
    while not studio.batches:
        time.sleep(0.005)
    desk.close()
    again = Queue(tmp_path / "state", Limits()).get(job.id)
    assert (again.state, again.tries) == ("waiting", 0)


def test_old_jobs_are_forgotten_with_their_files(tmp_path):
    queue = Queue(tmp_path, Limits(kept=2))
    names = [queue.add(order(seed), "v1").id for seed in range(4)]
    for job in queue.take(16):
        queue.files_of(job.id).mkdir(parents=True)
        queue.finish(job, {})
    queue.forget()
    assert [queue.get(name) is None for name in names] == [True, True, False, False]
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == set(names[2:])
    assert queue.order_text(queue.get(names[3])) == "", "what was asked for is not kept"


def test_a_worker_that_dies_is_replaced_and_its_job_made_again(desk_of, tmp_path):
    def dies(orders):
        raise SystemExit

    desk = desk_of([studio_of(tmp_path, dies), studio_of(tmp_path)])
    [job] = wait(desk.queue, desk.accept(order(), "v1").id)
    assert job.state == "done" and job.tries == 2


def test_a_job_that_workers_die_of_fails_alone(desk_of, tmp_path):
    def dies(orders):
        if any("bad" in one.request.prompt for one in orders.values()):
            raise SystemExit

    studio = studio_of(tmp_path, dies)
    hold = threading.Event()
    first = studio_of(tmp_path, lambda orders: hold.wait(2) and dies(orders))
    desk = desk_of([first, studio])
    desk.accept(order(steps=1), "v1")
    names = [desk.accept(order(seed, prompt="bad" if seed == 2 else "good"), "v1").id for seed in range(1, 5)]
    hold.set()
    jobs = wait(desk.queue, *names)
    assert [job.state for job in jobs] == ["done", "failed", "done", "done"]
    assert "died 2 times" in jobs[1].error
    assert desk.meters.deaths._value.get() >= 2


def test_several_workers_share_the_jobs(desk_of, tmp_path):
    studios = [studio_of(tmp_path), studio_of(tmp_path)]
    for studio in studios:
        studio.pause = 0.02
    desk = desk_of(studios, workers=2)
    names = [desk.accept(order(seed, steps=10, size=(64, 64 + 16 * seed)), "v1").id for seed in range(6)]
    assert {job.state for job in wait(desk.queue, *names)} == {"done"}
    made = [name for studio in studios for batch in studio.batches for name in batch]
    assert sorted(made) == sorted(names) and all(studio.batches for studio in studios)


def test_a_mistake_ends_one_batch_and_the_worker_stays(desk_of, tmp_path):
    def errs(orders):
        if any("bad" in one.request.prompt for one in orders.values()):
            raise RuntimeError("oh")

    desk = desk_of([studio_of(tmp_path, errs)])
    bad = desk.accept(order(prompt="bad"), "v1")
    [job] = wait(desk.queue, bad.id)
    assert (job.state, job.fault) == ("failed", "Mistake") and "RuntimeError: oh" in job.error
    [job] = wait(desk.queue, desk.accept(order(), "v1").id)
    assert job.state == "done"


def test_a_job_is_cancelled_while_it_waits_and_while_it_is_made(desk_of, tmp_path):
    studio = studio_of(tmp_path)
    studio.pause = 0.01
    desk = desk_of([studio])
    made, waits = (desk.accept(order(seed, steps=100 + seed), "v1") for seed in range(2))
    while not desk.progress.get(made.id) or not desk.progress[made.id].step:
        time.sleep(0.005)
    began = time.perf_counter()
    assert desk.cancel(waits.id).state == desk.cancel(made.id).state == "cancelled"
    [last] = wait(desk.queue, desk.accept(order(7), "v1").id)
    assert last.state == "done" and time.perf_counter() - began < 0.9, "the rest of the batch was not made"
    assert desk.queue.get(made.id).state == "cancelled"


def test_of_a_batch_one_job_is_cancelled_and_the_others_are_made(desk_of, tmp_path):
    hold = threading.Event()
    studio = studio_of(tmp_path, lambda orders: hold.wait(2))
    desk = desk_of([studio])
    names = [desk.accept(order(seed, steps=5), "v1").id for seed in range(4)]
    while len(studio.batches) < 1:
        time.sleep(0.005)
    desk.cancel(names[2])
    hold.set()
    assert [job.state for job in wait(desk.queue, *names)] == ["done", "done", "cancelled", "done"]


def test_a_base_that_cannot_be_loaded_ends_the_start(tmp_path, desk_of):
    studio = studio_of(tmp_path)
    studio.facts = lambda: (_ for _ in ()).throw(Invalid("no such base"))
    with pytest.raises(Invalid, match="no such base"):
        desk_of([studio])


def test_settings_are_checked_before_anything_starts(tmp_path):
    with pytest.raises(Invalid, match="allow-origin"):
        Desk(Settings(tmp_path, origins=("localhost",)), [])
