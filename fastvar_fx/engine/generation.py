"""Where a transformed model is in a generation: the only object that knows.

The token count of a block call (or `step_of`) determines its role. Each block goes through

    structure steps    dense; what an earlier generation left is dropped
    cache step         captures its branch outputs: one `Track` per call of the step
    pruned steps       in order, each call with the outputs of the track that it continues; once
                       the last block has met the last of them, they are freed

Which track a call continues is read from the caches that it is handed, else from its other
arguments, else from the order of calls. A call that comes out of order is the beginning of another
generation (source tokens as many as a pruned step's), or an error.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, NoReturn
from weakref import WeakValueDictionary

import torch

from fastvar_fx.engine.call import BlockCall
from fastvar_fx.engine.guidance import WITHOUT_GUIDANCE, Unguided, check_halves
from fastvar_fx.engine.loop import Loop, Place, Selected
from fastvar_fx.engine.plan import Plan
from fastvar_fx.engine.skipped import SkippedSteps
from fastvar_fx.engine.track import Captured, Live, Storages, Track, exists, live_of, memory
from fastvar_fx.engine.watch import Watch
from fastvar_fx.errors import CaptureMismatchError, ModelError, RunError


class Role(NamedTuple):
    """What a block does at a call.

    Attributes:
        step: The step whose program runs; None for none.
        track: After the cache step, its call that this one continues.
        captures: Whether the step is the cache step.
        passes: Whether the block returns its input, at a skipped step.
    """

    step: int | None = None
    track: Track | None = None
    captures: bool = False
    passes: bool = False

    @property
    def captured(self) -> Captured:
        """The branch outputs that a pruned step is restored from."""
        return self.track.outputs if self.track else {}


_MOST_LEFT: Final = 8
"""Generations that were left and may go on, at most, if what they captured keeps caches alive."""

DENSE: Final = Role()
PASS: Final = Role(passes=True)


class Generation:
    """The current generation of a transformed model, in each thread that runs it.

    Attributes:
        prunes: Whether the schedule is followed; if not, every step runs dense.
        dense_calls: Calls of blocks by token count that were neither capturing nor pruned.
        early_calls: Calls with a pruned step's token count that came before their generation's
            cache step, by token count.
        peak_captured_bytes: The most bytes of captured outputs held so far.
    """

    def __init__(self, plan: Plan) -> None:
        schedule = plan.schedule
        self.plan = plan
        self.prunes = True
        self.dense_calls: Counter[int] = Counter()
        self.early_calls: Counter[int] = Counter()
        self.peak_captured_bytes = 0
        self._tracks: list[list[Track]] = [[] for _ in plan.blocks]
        self._last_layer = 0  # the last block that captured; there may be others that never run
        self._threads = threading.local()  # the loop of each, for as long as it runs
        self._loop = self._threads.loop = Loop(plan)
        self._loops = WeakValueDictionary({threading.get_ident(): self._loop})
        self._cache_step = schedule.cache_step
        self._cache_tokens = schedule.length(schedule.cache_step)
        self._positions = {step: i for i, step in enumerate(plan.pruned_steps)}
        self._end = len(self._positions) - 1
        late = (schedule.cache_step, *plan.pruned_steps) if plan.pruned_steps else ()
        self._late_steps = {schedule.length(step): step for step in late}
        self._unguided = {schedule.length(step): step for step in plan.unguided_steps}

    # --- the state machine ----------------------------------------------------------------------

    def at(self, call: BlockCall) -> Role:
        """Returns the role of a call.

        Raises:
            ModelError: If the block is in training mode.
            RunError: If the call comes out of order.
            CaptureMismatchError: If it does not fit what was captured.
        """
        if not call.compiling:  # nothing may change
            self._loop = self._thread_loop()
        if self.plan.skipped_steps and self._loop.skipped.passes(call):
            return PASS
        role = self._role(call)
        if self.plan.unguided_steps:
            self._end_guidance(call, role)
        return role

    def _role(self, call: BlockCall) -> Role:
        """Returns the role of a call at a step that is not skipped."""
        if not (self.prunes and call.site.prunes):
            return DENSE
        step = self._late_step(call)
        if step is None:
            return self._dense(call) if self._tracks[call.site.layer] else DENSE
        if call.block.training:
            raise ModelError(
                f"{call.site.name} is in training mode and the schedule prunes; call model.eval() "
                f"first"
            )
        return self._capturing(call) if step == self._cache_step else self._pruned(call, step)

    def ran(self, call: BlockCall, role: Role, result: Any, outputs: Captured) -> None:
        """Moves on, after a call of a role other than PASS.

        Args:
            call: The call.
            role: What `at` returned for it.
            result: What the block returned.
            outputs: What it captured, at the cache step, or selected for the blocks after it.
        """
        if role.captures:
            self._capture(call, result, outputs)
        elif role.step is not None and role.track is not None:
            if outputs or self._loop.selected is not None:
                self._share_selection(call, role.step, outputs)
            self._continue(call, role.track, self._positions[role.step], result)
        elif role.track is not None:
            role.track.note_written(call, result)
        if self.plan.skipped_steps:
            self._loop.skipped.returned(call, result)

    def _end_guidance(self, call: BlockCall, role: Role) -> None:
        """Makes a call at a step without guidance run the conditional half of its batch.

        Raises:
            RunError: If the batch has no two halves of the same images.
        """
        plan, batch = self.plan, call.x.shape[0]
        step = role.step
        if step is None and self.prunes:
            step = self._unguided_step(call)
        if step not in plan.unguided_steps:
            if self._loop.unguided is not None:
                self._loop.unguided = None
            return
        if batch % 2:
            raise RunError(
                f"{call.site.name} at step {step}: guidance_until takes the two halves of a batch "
                f"for the same images with and without condition; found a batch of {batch}. "
                f"{WITHOUT_GUIDANCE}"
            )
        if not call.compiling:
            self._check_structure(call, step)
            self._loop.watch.changed(self._length(call, step))
        tokens = (plan.schedule.tokens(step), call.tokens)
        call.unguided = Unguided(step, plan.half(batch), tokens, call.x.shape[2])
        if call.site.layer == 0:
            check_halves(call, call.unguided, plan.around(step, call.tokens))
        self._loop.unguided = call.unguided

    def _check_structure(self, call: BlockCall, step: int) -> None:
        """Drops a block's programs if it was edited; users edit models between generations."""
        if step == self.plan.first_program(prunes=call.site.prunes):
            call.site.check_structure(call.block)

    def _unguided_step(self, call: BlockCall) -> int | None:
        """Returns the step of a call that runs dense, if it has no guidance."""
        if self.plan.step_of is not None:
            return self.plan.step_of(call.block, call.args, call.kwargs)
        if not call.site.prunes and not call.compiling:
            self._loop.watch.saw(call.tokens, call.site.layer)
        early = call.site.prunes and call.tokens in self._late_steps  # such as source tokens
        return None if early else self._unguided.get(call.tokens)

    def _late_step(self, call: BlockCall) -> int | None:
        """Returns the step, if it is the cache step or a pruned one; notes any other."""
        step_of = self.plan.step_of
        if step_of is not None:
            step = step_of(call.block, call.args, call.kwargs)
            if step is not None and (step == self._cache_step or step in self._positions):
                return step
            if step is None or step < self._cache_step:
                self._structure(call, step)
            return None
        if call.tokens < self._cache_tokens:
            self._structure(call, call.tokens)
            return None
        step = self._late_steps.get(call.tokens)
        if step is None:
            self._note(call, self.dense_calls, call.tokens)
        return step

    def _structure(self, call: BlockCall, step: int | None) -> None:
        """Notes a call before the cache step, and whether another generation begins with it."""
        layer = call.site.layer
        place = self._loop.places[layer]
        if call.compiling:  # an assignment, even of the same value, is a guard for Dynamo
            if self._tracks[layer]:
                self._tracks[layer] = []
            if not place.began:
                place.began = True
            return
        self._note(call, self.dense_calls, step)
        captured = self._tracks[layer] and (not place.began or self._own(layer, place))
        if place.late or captured or (step or 0) < (place.step or 0):
            self._begin_next(call, place)
        place.calls = place.calls + 1 if step == place.step and not place.aborted else 1
        place.step, place.began, place.ended, place.aborted = step, True, False, False

    def _dense(self, call: BlockCall) -> Role:
        """Returns the role of a step between pruned ones that runs dense, and grows the caches."""
        tracks = self._tracks[call.site.layer]
        if call.compiling or not any(track.caches for track in tracks):
            return DENSE
        track = continued(tracks, call.reads())
        return Role(track=track) if track is not None and track.caches else DENSE

    def _capturing(self, call: BlockCall) -> Role:
        if not call.compiling:
            self._loop.watch.saw(self._length(call, self._cache_step), call.site.layer)
            place = self._loop.places[call.site.layer]
            if place.late and not self._cache_step:
                self._begin_next(call, place)
            self._check_structure(call, self._cache_step)
            call.reads()
        return Role(self._cache_step, captures=True)

    def _capture(self, call: BlockCall, result: Any, outputs: Captured) -> None:
        """Keeps what a call of the cache step captured."""
        layer = call.site.layer
        place = self._loop.places[layer]
        if place.late or place.aborted or not place.began:  # drawn again, or a generation begins
            was = place.step, place.calls, place.began, place.cut_off
            self._begin(layer, place)
            if self._cache_step:
                place.step, place.calls, place.began, place.cut_off = was
        track = Track(call, place, outputs)
        self._tracks[layer].append(track)
        place.began, place.ended = place.began or not self._cache_step, False
        if call.compiling:
            return
        track.reads, track.x = call.reads(), memory(call.x)
        self._loop.captures.enter(layer)
        track.drawn = self._loop.captures.number
        track.note_written(call, result)
        track.caches = bool(track.wrote)
        if place.step is not None:  # a step that is drawn again and again
            for other in self._own(layer, place)[: -2 * place.calls]:
                if not other.may_go_on():
                    self._drop(layer, other)
        if layer >= self._last_layer:
            self._last_layer = layer
            self.peak_captured_bytes = max(self.peak_captured_bytes, self.captured_bytes)

    def _pruned(self, call: BlockCall, step: int) -> Role:
        position = self._positions[step]
        track = self._track_of(call, step, position)
        selected = self._loop.selected
        layer, batch = call.site.layer, call.x.shape[0]
        if selected is not None and selected.fits(step, layer, batch):
            call.selection = selected.tensors if self.plan.kept(step, layer) else None
        if (
            track is None
            or position not in (track.position, track.position + 1)
            or (call.match(step) is None and self._caches_are_empty(call))
        ):
            return self._out_of_order(call, step)
        if not call.compiling:
            self._loop.watch.saw(self._length(call, step), call.site.layer, pruned=True)
        return Role(step, self._fitting(call, step, track))

    def _share_selection(self, call: BlockCall, step: int, selected: Captured) -> None:
        """Keeps a selection for the blocks that come after this one."""
        layer, batch = call.site.layer, call.x.shape[0]
        if selected:
            tensors = tuple(selected.values())
            self._loop.selected = Selected(step, layer, batch, tensors)
        elif layer >= self._last_layer:
            self._loop.selected = None

    def _continue(self, call: BlockCall, track: Track, position: int, result: Any) -> None:
        """Notes that a call of a pruned step ran, and frees what was captured after the last."""
        layer = call.site.layer
        place = self._loop.places[layer]
        track.met(position)
        place.position = position
        if call.compiling:
            if position == self._end:
                self._tracks[layer] = [other for other in self._tracks[layer] if other is not track]
                place.reset()
            return
        place.aborted = False
        if track.caches:
            track.note_written(call, result)
        last = position == self._end and layer >= self._last_layer
        if last and not any(track.goes_on(self._end) for track in self._own(layer, place)):
            self._free_ended()

    def _out_of_order(self, call: BlockCall, step: int) -> Role:
        """A pruned step's length without this generation's capture: source tokens, or a mistake."""
        layer = call.site.layer
        place = self._loop.places[layer]
        expected = call.tokens in self.early_calls or self._caches_are_empty(call)
        others = any(track.place is not place for track in self._tracks[layer])
        lost = place.began or place.cut_off or place.ended or others
        self._begin(layer, place)
        if lost and not expected:
            place.cut_off = True
            self._raise_missing(call, step)
        self._note(call, self.early_calls, self._length(call, step))
        return DENSE

    def _raise_missing(self, call: BlockCall, step: int) -> NoReturn:
        raise RunError(
            f"{call.site.name}: step {step} ({call.tokens} tokens) came without the "
            f"steps before it: the features of cache step {self._cache_step} "
            f"({self._cache_tokens} tokens) or of the pruned step before are missing. Dense so "
            f"far: {sorted(self.dense_calls)} tokens. Give the schedule that the loop runs: "
            f"scales {self.plan.schedule.scales}. A generation that was left for another one, "
            f"drawn to its end, or continued on a copy of the model is drawn again from its first "
            f"step; to run two at once, transform or deep-copy the model once for each"
            f"{self.plan.one_of}"
        )

    def _length(self, call: BlockCall, step: int) -> int:
        """Returns what tells the step of a call."""
        return call.tokens if self.plan.step_of is None else step

    def _note(self, call: BlockCall, calls: Counter[int], length: int | None) -> None:
        """Notes a dense call; `length` is None if it is no step."""
        if not call.compiling:
            calls[call.tokens] += 1
            if length is not None:
                self._loop.watch.saw(length, call.site.layer)

    def _caches_are_empty(self, call: BlockCall) -> bool:
        """Whether caches that the block reads at the cache step are empty: a generation begins."""
        programs = call.site.programs.get(self._cache_step, ())
        found = [program.misses_caches(call) for program in programs]
        known = [misses for misses in found if misses is not None]
        return bool(known) and all(known)  # some calls of a step may read more than others

    # --- which call of the cache step a call continues ------------------------------------------

    def _track_of(self, call: BlockCall, step: int, position: int) -> Track | None:
        """Returns the track that a call continues; None if there is none.

        Raises:
            RunError: If it may be one of several, or none of those that there are.
        """
        layer = call.site.layer
        tracks = self._tracks[layer]
        if len(tracks) == 1 and not tracks[0].caches and tracks[0].position < position:
            if self._loop.places[layer].left and not call.compiling:
                self._check_not_left(call, step, tracks[0])
            return tracks[0]
        if not tracks:
            return None
        if not call.compiling:
            self._drop_split(layer, position)
            found = continued(self._tracks[layer], call.reads())
            if found is not None:
                if found.position == position and not found.followed:
                    _raise_uncertain(call.site.name, "another one continued the same")
                found.followed = True
                if not found.wrote.isdisjoint(call.reads()):
                    self._drop_rejected(layer, found)
                return found
        return self._by_order(call, step, position)

    def _by_order(self, call: BlockCall, step: int, position: int) -> Track | None:
        """Returns the first track that did not meet the step yet, else one to draw it again."""
        layer = call.site.layer
        place = self._loop.places[layer]
        own = self._settled(layer, place) or self._handed_over(layer)
        if not own:
            return None
        # The loop may have put others in the place of its caches; then those it had are gone.
        free = [t for t in own if not t.followed or (t.caches and not t.may_go_on())]
        if not free:
            _raise_uncertain(call.site.name, "it reads what none of them read or wrote")
        waiting = [track for track in free if track.position < position]
        if len(waiting) > 1 and any(track.position < position - 1 for track in waiting):
            _raise_uncertain(call.site.name, "the pruned step before ran fewer calls")
        if len({track.draws for track in waiting}) > 1:
            _raise_uncertain(call.site.name, "the pruned step before ran some of them again")
        place.counted = place.counted or len(free) > 1
        if waiting:
            if not call.compiling:
                self._check_not_left(call, step, waiting[0])
                self._check_one_map(call, own, position)
                self._check_order(call, own, waiting[0])
            return waiting[0]
        again = min(free, key=lambda track: track.draws)
        alike = not again.reads or again.reads_alike(call.reads())
        expected = place.aborted or (place.calls == len(own) and not place.cut_off)
        if place.doubted or not expected or not alike:
            raise RunError(
                f"{call.site.name} runs for the {len(own) + 1}. time in step {step}, but ran only "
                f"{len(own)} times in the cache step {self._cache_step}; give a cache_step at "
                f"which every block runs as often as in the pruned steps. If the step is drawn "
                f"again, or two loops alternate, draw the whole generation again, and transform or "
                f"deep-copy the model once for each loop"
            )
        if not call.compiling:
            self._check_order(call, own, again)
        return again

    def _check_not_left(self, call: BlockCall, step: int, track: Track) -> None:
        """Checks that a call does not continue a generation that was left for the track's.

        Raises:
            RunError: If it reads what only the former read.
        """
        left, reads = track.place.left, call.reads()
        if reads & left - track.reads and not reads & track.reads - left:
            self._raise_missing(call, step)

    def _check_one_map(self, call: BlockCall, own: Sequence[Track], position: int) -> None:
        """Checks that calls of a step get one token map if they did at the cache step.

        Raises:
            RunError: If not: the step seems to be left amid its calls and drawn again.
        """
        place, x = self._loop.places[call.site.layer], memory(call.x)
        if len(own) > 1 and self._cache_step and len({track.x for track in own}) == 1:
            if place.x is not None and place.x[0] == position and place.x[1] != x:
                _raise_uncertain(call.site.name, "it gets another token map than the call before")
        place.x = position, x

    def _check_order(self, call: BlockCall, own: Sequence[Track], track: Track) -> None:
        """Checks that all blocks continue one call of the loop in a pass through them.

        Raises:
            RunError: If not: a step seems to be left amid its calls and drawn again.
        """
        if len(own) < 2:
            return
        course = self._loop.continues
        if course.enter(call.site.layer) or course.follows is None:
            course.follows = track.drawn
        elif course.follows != track.drawn:
            _raise_uncertain(call.site.name, "the blocks before it continue another one")

    def _settled(self, layer: int, place: Place) -> list[Track]:
        """Returns this generation's tracks, without those of a cache step that was drawn again."""
        own, calls = self._own(layer, place), place.calls
        drawn = len(own)
        if place.late or place.step is None or drawn <= calls or drawn % calls:
            return own
        pairs = list(zip(own, own[calls:], strict=False))
        if not all(not a.reads or a.reads_alike(b.reads) for a, b in pairs):
            return own  # the loop runs more calls from the cache step on
        place.doubted = not any(a.reads for a, _ in pairs)
        dropped = own[:-calls]
        self._tracks[layer] = [track for track in self._tracks[layer] if track not in dropped]
        return own[-calls:]

    def _own(self, layer: int, place: Place) -> list[Track]:
        return [track for track in self._tracks[layer] if track.place is place and not track.left]

    def _handed_over(self, layer: int) -> list[Track]:
        """Returns the tracks of another thread's loop, if it is the only one under way."""
        places = {id(track.place) for track in self._tracks[layer]}
        return [*self._tracks[layer]] if len(places) == 1 else []

    def _drop_split(self, layer: int, position: int) -> None:
        """Drops tracks whose samples went on in several calls, once the next step begins."""
        tracks = self._tracks[layer]
        if any(track.parts for track in tracks):
            self._tracks[layer] = [t for t in tracks if not (t.parts and t.position < position)]

    def _drop_rejected(self, layer: int, found: Track) -> None:
        """Drops tracks that no loop can continue, for it holds none of their caches any more."""
        tracks = self._tracks[layer]
        if len(tracks) > 1:
            self._tracks[layer] = [t for t in tracks if t is found or t.may_go_on() or not t.caches]

    # --- what was captured ----------------------------------------------------------------------

    def _fitting(self, call: BlockCall, step: int, track: Track) -> Track:
        """Returns the track, or the part of it that the loop still runs."""
        live, was = live_of(call.x), track.live
        if live == was or not track.outputs:
            return track
        if live[0] < was[0] and live[1:] == was[1:]:
            return self._part(call, step, track)
        self._drop(call.site.layer, track)
        raise CaptureMismatchError(
            f"{call.site.name} at step {step}: asked to restore {_describe(live)} from what the "
            f"cache step {self._cache_step} captured, {_describe(was)}. Keep batch, device and "
            f"dtype within one generation"
        )

    def _part(self, call: BlockCall, step: int, track: Track) -> Track:
        """Returns the track of the samples that the loop still runs in a call, such as a half."""
        layer, (batch, *_), live = call.site.layer, track.live, call.x.shape[0]
        rows = track.place.rows.setdefault((batch, live), set())
        found = self._first_rows(call, batch, live) or rows  # what other calls of the step show
        if len(found) != 1:
            self._drop(layer, track)
            raise CaptureMismatchError(
                f"{call.site.name} at step {step}: the cache step {self._cache_step} captured "
                f"batch {batch}, of which {live} are left; which ones is unknown: "
                f"{_no_evidence(call, found, batch)}. Pass live_rows='first' or 'last' to "
                f"fastvar_fx.transform"
            )
        (first,) = found
        rows.add(first)
        part = track.part(call, first)
        tracks = self._tracks[layer]
        if part not in tracks:
            tracks.insert(tracks.index(track), part)
        if self.plan.live_rows is not None:
            tracks.remove(track)
        else:
            track.met(self._positions[step])
        return part

    def _first_rows(self, call: BlockCall, batch: int, live: int) -> set[int]:
        """Returns which of `batch` samples may come first now that `live` of them are left."""
        if self.plan.live_rows is not None:
            return {0 if self.plan.live_rows == "first" else batch - live}
        if call.compiling:
            return set()
        known = [program for programs in call.site.programs.values() for program in programs]
        return set().union(*(program.first_rows(call, batch, live) for program in known))

    @property
    def captured_bytes(self) -> int:
        """Bytes of captured outputs held now."""
        tracks = [track for tracks in self._tracks for track in tracks if not track.parts]
        return sum(output.nbytes for track in tracks for output in track.outputs.values())

    # --- beginning and end ----------------------------------------------------------------------

    def _begin(self, layer: int, place: Place) -> None:
        """Ends what a block did in the last generation of its loop, and of loops that are gone."""
        if torch.compiler.is_compiling():
            self._tracks[layer] = []
            place.reset()
            return
        kept, cut_off = [], place.cut_off and not place.ended
        for track in self._tracks[layer]:
            ended = track.position == self._end
            track.left = track.left or track.place is place or track.place.loop() is None
            if not track.left or (track.may_go_on() and not ended):
                kept.append(track)
            else:
                cut_off = cut_off or (place.began and not ended)
                place.left |= set() if ended or track.caches else track.reads
        place.left = set(filter(exists, place.left))
        unknown = [track for track in kept if track.left and track.keeps_its_caches]
        dropped = unknown[:-_MOST_LEFT]
        self._tracks[layer] = [track for track in kept if track not in dropped]
        place.cut_off, place.ended = cut_off, False
        place.reset()

    def _begin_next(self, call: BlockCall, place: Place) -> None:
        """Begins another generation of a loop, if nothing was left out at the end of the last."""
        incomplete = self._incomplete(call.site.layer)
        self._begin(call.site.layer, place)
        if incomplete:
            _raise_uncertain(call.site.name, "the last step of the last generation ran fewer")

    def _free_ended(self) -> None:
        """Frees what tracks captured that met the last step."""
        for layer, tracks in enumerate(self._tracks):
            ended = [track for track in tracks if track.ended(self._end)]
            self._tracks[layer] = [track for track in tracks if track not in ended]
            for place in {id(track.place): track.place for track in ended}.values():
                if not self._own(layer, place):
                    place.reset()
                    place.ended = True

    def _drop(self, layer: int, track: Track) -> None:
        self._tracks[layer] = [other for other in self._tracks[layer] if other is not track]

    def aborted(self) -> None:
        """Notes that a call of a block raised an exception: its step may be drawn again."""
        for place in self._loop.places:
            place.aborted = True

    def _incomplete(self, layer: int) -> bool:
        """Whether the last step ran fewer calls than the cache step, told apart by order alone."""
        place = self._loop.places[layer]
        met_all = place.counted and place.position == self._end and not place.aborted
        return met_all and any(t.position < self._end for t in self._own(layer, place))

    def reset(self) -> None:
        """Ends the generation, wherever it is, and frees what was captured."""
        self._tracks = [[] for _ in self._tracks]
        for reference in self._loops.valuerefs():  # a list, whatever other threads begin
            loop = reference()
            if loop is not None:
                loop.reset()

    def leave(self) -> None:
        """Ends the generation of the current thread, because the loop runs another schedule."""
        self._enter_thread()
        for layer, place in enumerate(self._loop.places):
            self._begin(layer, place)
        self._loop.watch.cut_off()

    def copy(self) -> Generation:
        """Returns one for a copy of the model, which cannot go on with this generation."""
        made = Generation(self.plan)
        for place, tracks in zip(made._loop.places, self._tracks, strict=True):
            place.cut_off = bool(tracks)
        return made

    def expects(self, call: BlockCall) -> bool:
        """Whether a call may continue what was captured."""
        return call.tokens in self._late_steps and bool(self._tracks[call.site.layer])

    @contextmanager
    def running_dense(self) -> Iterator[None]:
        """Within it, whole generations run dense at every step that the loop draws."""
        self.prunes = False
        try:
            yield
        finally:
            self.prunes = True

    @property
    def watch(self) -> Watch:
        """What the blocks saw in the loop of this thread."""
        return self._own_loop().watch

    @property
    def unguided(self) -> Unguided | None:
        """The step without guidance that the loop of this thread is at, if it is at one."""
        return self._own_loop().unguided

    def end_loop(self) -> None:
        """Notes that a loop of the current thread has ended."""
        self._own_loop().unguided = None

    @property
    def skipped(self) -> SkippedSteps:
        """The steps that the loop of the current thread leaves out."""
        return self._own_loop().skipped

    @property
    def seen(self) -> list[int]:
        """Token counts of the calls that ran dense."""
        return sorted(self.dense_calls | self.early_calls)

    def check_ended(self) -> None:
        """Checks, at the end of a generation, that it ran as the schedule says.

        Raises:
            RunError: If blocks ran at a skipped step and their result was used, or if some calls of
                a step were left out and which ones is unknown.
        """
        self.skipped.check()
        self.check_calls()

    def check_calls(self) -> None:
        """Checks, at the end of a generation, that the last step ran as many calls as the first.

        Raises:
            RunError: If some calls of a step were left out and which ones is unknown.
        """
        for layer, name in enumerate(self.plan.blocks):
            if self._incomplete(layer):
                _raise_uncertain(name, "the last step ran fewer calls")

    # --- loops ----------------------------------------------------------------------------------

    def _enter_thread(self) -> None:
        """Makes the loop of this thread the current one, while the block's lock is held."""
        if not torch.compiler.is_compiling():  # nothing may change
            self._loop = self._own_loop()

    def _own_loop(self) -> Loop:
        """Returns the loop of this thread; a block of another one may run meanwhile."""
        return self._loop if torch.compiler.is_compiling() else self._thread_loop()

    def _thread_loop(self) -> Loop:
        try:
            return self._threads.loop  # type: ignore[no-any-return]
        except AttributeError:
            made = self._threads.loop = Loop(self.plan, like=self._loop)
            self._loops[threading.get_ident()] = made
            return made


def continued(tracks: Sequence[Track], reads: Storages) -> Track | None:
    """Returns the only track whose caches a call reads, else the only one whose arguments it reads.

    Args:
        tracks: The tracks of a block.
        reads: The memory of the call's arguments.
    """
    found = [track for track in tracks if not track.wrote.isdisjoint(reads)]
    if not found and len(tracks) > 1:
        times = Counter(storage for track in tracks for storage in track.reads)
        own = {storage for storage in reads if times[storage] == 1}
        found = [track for track in tracks if not track.reads.isdisjoint(own)]
    return found[0] if len(found) == 1 else None


def _raise_uncertain(block: str, why: str) -> NoReturn:
    raise RunError(
        f"{block} runs several times in a step, and which call of the cache step one of a pruned "
        f"step continues is unknown: {why}. Hand each of them its own caches, or give a cache_step "
        f"at which every block runs as often as at the pruned steps. If a step was left amid its "
        f"calls, call fastvar_fx.reset(model) and draw the whole generation again"
    )


def _describe(live: Live) -> str:
    batch, device, dtype = live
    return f"batch {batch} on {device}, {str(dtype).removeprefix('torch.')}"


def _no_evidence(call: BlockCall, found: set[int], batch: int) -> str:
    if call.compiling:
        return "torch.compile hides whether the block's caches are views of the earlier ones"
    if found:
        return f"its inputs are cut at different samples, {sorted(found)}"
    return f"none of the tensors it reads, such as its caches, is a slice of one of batch {batch}"
