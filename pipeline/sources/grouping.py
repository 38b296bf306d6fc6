"""Groups the members of a tar into samples.

Where each sample's image, caption and json are adjacent, as img2dataset writes them, samples are formed while the tar
is streamed. The first sample that is not so may have further members anywhere in the tar. From there on the members are
listed first, to the end of the tar, and the images are read in a second pass. Both ways give the same samples.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Generator, Iterable, Iterator
from typing import NamedTuple

from pipeline.sources.members import MAX_NAMES, File, Kind, MemberName, Members, NameReader
from pipeline.sources.tars import BrokenTar, TarMember
from transforms.core.recipe import PoolSettings
from transforms.storage.steady_reader import SteadyReader

Fault = tuple[str, str]
"""The reason code and the message of a dead letter."""

MAY_LACK_FILES = "the rest of the tar is not read, and more of this sample may be there"
_KINDS: set[Kind] = {"image", "caption", "metadata"}
_ENTRY_BYTES = 500  # of memory, beside name and content: measured


@dataclasses.dataclass
class Reading:
    """A record of one pass over a tar.

    `keys` is the key of each sample, derived from member names independently of the parsed samples. `size_bytes` is the
    number of bytes read.
    """

    keys: list[str] = dataclasses.field(default_factory=list)
    size_bytes: int = 0


class _Entry(NamedTuple):
    """A member that belongs to a sample. `content` is None where it is not in memory."""

    name: MemberName
    member: str
    offset: int
    size_bytes: int
    content: bytes | None
    fault: Fault | None


_Named = Iterator[tuple[MemberName, TarMember]]


def group_members(
    path: str, members: Iterable[TarMember], pool: PoolSettings, reading: Reading
) -> Iterator[Members]:
    """Yield the samples of the tar at `path` in the order of their images, and fill in `reading`.

    `members` streams the same tar. Raises BrokenTar after the samples before the damage. The sample at the damage is
    left out unless it has all three files, because the rest of it may be lost.
    """
    names = NameReader(pool)
    named = ((name, member) for member in members if (name := names.read(member.name)) is not None)
    emitted: set[str] = set()
    found = yield from _adjacent(named, pool, emitted, reading)
    if found is not None:
        yield from _listed(path, *found, pool, emitted, reading)


def _adjacent(
    named: _Named, pool: PoolSettings, emitted: set[str], reading: Reading
) -> Generator[Members, None, tuple[list[_Entry], _Named] | None]:
    """Yield samples as long as each has an image, a caption and a json that are adjacent, and nothing else.

    Returns the members of the first other sample, as far as it was read, and the members that follow.
    """
    held: list[_Entry] = []
    try:
        for name, member in named:
            if held and held[0].name.key != name.key:
                if not _is_plain(held):
                    return held, itertools.chain([(name, member)], named)
                yield _plain(held, emitted, reading)
                held = []
            if name.key in emitted:
                return held, itertools.chain([(name, member)], named)
            held.append(_entry(name, member, pool, in_memory=True))
    except BrokenTar:
        if _is_plain(held):
            yield _plain(held, emitted, reading)
        raise
    if held and not _is_plain(held):
        return held, iter(())
    if held:
        yield _plain(held, emitted, reading)
    return None


def _is_plain(entries: list[_Entry]) -> bool:
    return (
        len(entries) == 3
        and {entry.name.kind for entry in entries} == _KINDS
        and not any(entry.fault for entry in entries)
    )


def _plain(entries: list[_Entry], emitted: set[str], reading: Reading) -> Members:
    key = entries[0].name.key
    emitted.add(key)
    reading.keys.append(key)
    files = {entry.name.kind: _file(entry, entry.content or b"") for entry in entries}
    names = tuple([entry.member for entry in entries])
    return Members(key, files["image"], files["caption"], files["metadata"], names=names)


def _file(entry: _Entry, content: bytes) -> File:
    return File(content, entry.member.rpartition(".")[2].lower(), entry.offset)


def _entry(name: MemberName, member: TarMember, pool: PoolSettings, in_memory: bool) -> _Entry:
    """Check a member against the recipe's limits, and read it if it is to be in memory."""
    fault, content = _fault(name, member, pool), None
    if in_memory and name.kind and not fault:
        content = member.read(-1)
    return _Entry(name, member.name, member.offset, member.size_bytes, content, fault)


def _fault(name: MemberName, member: TarMember, pool: PoolSettings) -> Fault | None:
    if name.full_length > pool.max_key_characters:
        return "key_too_long", f"the key has {name.full_length} characters; the recipe allows {pool.max_key_characters}"
    if name.kind is None:
        return None
    if not member.is_file:
        return "unsupported_member", f"{member.name} is a link, a device or a sparse file"
    if member.size_bytes > name.max_bytes:
        message = f"{member.name} has {member.size_bytes} bytes; the recipe allows {name.max_bytes}"
        return f"{name.kind}_too_large", message
    return None


def _listed(
    path: str, first: list[_Entry], named: _Named, pool: PoolSettings, emitted: set[str], reading: Reading
) -> Iterator[Members]:
    """List the members up to the end of the tar, then yield their samples."""
    listing, broken = _Listing(pool, emitted), None
    try:
        for entry in first:
            listing.add(entry)
        for name, member in named:
            listing.begin(name.key)
            in_memory = name.kind != "image" and listing.has_room_for(member.size_bytes)
            listing.add(_entry(name, member, pool, in_memory))
    except BrokenTar as error:
        broken = error
    with SteadyReader(path) as file:
        for group in listing.samples(is_broken=broken is not None):
            members = _read(group, file, reading)
            if members is not None or broken is None:
                reading.keys.append(group.key)
                yield members or _changed(group)
    if broken is not None:
        raise broken


def _read(group: _Group, file: SteadyReader, reading: Reading) -> Members | None:
    """Return the files of a sample; None if the tar ends before one of them does."""
    members = Members(
        group.key,
        fault=group.fault,
        names=tuple(group.names),
        is_repeated=group.is_repeated,
        may_lack_files=group.may_lack_files,
    )
    for kind, entry in group.files.items() if not group.fault else ():
        content = entry.content
        if content is None:
            file.seek(entry.offset)
            content = file.read(entry.size_bytes)
            reading.size_bytes += len(content)
            if len(content) < entry.size_bytes:
                return None
        setattr(members, kind, _file(entry, content))
    return members


def _changed(group: _Group) -> Members:
    message = "the tar has become shorter while it was read"
    return Members(group.key, fault=("vanished", message), names=tuple(group.names), is_repeated=group.is_repeated)


class _Group:
    """The members of one sample: its file of each kind, and the first fault found in them."""

    def __init__(self, key: str, is_repeated: bool) -> None:
        self.key, self.is_repeated = key, is_repeated
        self.files: dict[Kind, _Entry] = {}
        self.names: list[str] = []
        self.fault: Fault | None = None
        self.may_lack_files = False
        self._first_offset: int | None = None
        self._runs: dict[Kind | None, int] = {}

    @property
    def place(self) -> int:
        """The byte of the tar at which its image begins, else its first member."""
        image = self.files.get("image")
        return image.offset if image else self._first_offset or 0

    def accepts(self, entry: _Entry) -> bool:
        """Whether the sample has no file yet that the recipe ranks like this one."""
        there = self.files.get(entry.name.kind) if entry.name.kind else None
        return there is None or there.name.rank != entry.name.rank

    def has_from(self, run: int, kind: Kind | None) -> bool:
        """Whether its file of this kind is of that run of adjacent members."""
        return self._runs.get(kind) == run

    def add(self, entry: _Entry, run: int) -> None:
        """Add a member that is accepted, or record that it is a second one of its kind."""
        if self._first_offset is None:
            self._first_offset = entry.offset
        if len(self.names) < MAX_NAMES:
            self.names.append(entry.member)
        kind = entry.name.kind
        if not self.accepts(entry):
            self.fault = self.fault or ("duplicate_member", f"a second {kind}: {entry.member}")
            return
        there = self.files.get(kind) if kind else None
        if there is not None and there.name.rank < entry.name.rank:
            return
        self.fault = self.fault or entry.fault
        if kind:
            self.files[kind], self._runs[kind] = entry, run


class _Listing:
    """The members of a tar by sample, from one pass over it. Memory is bounded by the recipe."""

    def __init__(self, pool: PoolSettings, emitted: set[str]) -> None:
        self._emitted, self._max_bytes = emitted, pool.max_regroup_bytes
        self._groups: dict[str, list[_Group]] = {}
        self._key, self._run = "", 0  # the adjacent members of one key, and how many such runs came before
        self._group: _Group | None = None
        self._is_scattered = False
        self._index_bytes = self._content_bytes = 0

    def has_room_for(self, size_bytes: int) -> bool:
        """Whether a content may stay in memory. At most half of the memory is for contents."""
        return 2 * (self._content_bytes + size_bytes) <= self._max_bytes

    def begin(self, key: str) -> None:
        """A member of this sample follows. It is the one at risk where the tar breaks off."""
        if key != self._key:
            self._key, self._run, self._group = key, self._run + 1, None

    def add(self, entry: _Entry) -> None:
        """Add a member. Raises BrokenTar where there are too many of them."""
        self.begin(entry.name.key)
        self._content_bytes += len(entry.content or b"")
        self._index_bytes += _ENTRY_BYTES + 2 * len(entry.member)
        if 2 * self._index_bytes > self._max_bytes:
            raise BrokenTar(
                f"at byte {entry.offset}: the members of a sample are not adjacent, and listing all members takes more "
                f"memory than the recipe allows ({self._max_bytes} bytes); repack the tar with tar --sort=name, or "
                "raise pool.max_regroup_bytes; the rest of the tar was not read",
                "tar_too_large",
            )
        self._group = self._group_of(entry)
        self._group.add(entry, self._run)

    def samples(self, is_broken: bool) -> list[_Group]:
        """Return the samples in tar order; of a broken tar without the one at the damage, unless it is complete."""
        at_risk = self._group if is_broken else None
        own = [group for groups in self._without_further_files() for group in groups]
        kinds: set[Kind] = {kind for group in own for kind in group.files}
        if self._emitted:
            kinds = _KINDS
        found = []
        for group in sorted(own, key=lambda group: group.place):
            if group is at_risk and (group.fault or len(group.files) < 3):
                continue
            group.may_lack_files = is_broken and (self._is_scattered or len(group.files) == 1)
            if group.may_lack_files and self._is_scattered and not kinds <= group.files.keys():
                group.fault = group.fault or ("broken_tar", f"{MAY_LACK_FILES}; the key has {', '.join(group.names)}")
            found.append(group)
        return found

    def _group_of(self, entry: _Entry) -> _Group:
        """Return the sample that a member belongs to: of those with its key the one that it stands beside, else the
        first that still lacks files and this one, else a new one."""
        key, beside = entry.name.key, self._group
        groups = self._groups.setdefault(key, [])
        self._is_scattered |= beside is None and (bool(groups) or key in self._emitted)
        if beside is not None and (beside.accepts(entry) or beside.has_from(self._run, entry.name.kind)):
            return beside
        for group in groups:
            if len(group.files) < len(_KINDS) and group.accepts(entry):
                return group
        groups.append(_Group(key, is_repeated=bool(groups) or key in self._emitted))
        return groups[-1]

    def _without_further_files(self) -> Iterator[list[_Group]]:
        """Yield the samples of each key, but for a key that only names further files of another sample.

        That is a key with a dot that lacks an image or a text, where a key before that dot exists: k.seg.png beside
        k.jpg, as in webdataset.
        """
        for key, groups in self._groups.items():
            files = groups[0].files
            if "image" not in files or not {"caption", "metadata"} & files.keys():
                before = next((start for start in _starts(key) if start in self._groups or start in self._emitted), "")
                if before:
                    for group in self._groups.get(before, ())[:1]:
                        group.names += groups[0].names[: MAX_NAMES - len(group.names)]
                    continue
            yield groups


def _starts(key: str) -> Iterator[str]:
    """Yield what precedes each dot of the last part of a key, longest first."""
    start = key.rfind("/") + 1
    dot = key.rfind(".", start)
    while dot > start:
        yield key[:dot]
        dot = key.rfind(".", start, dot)
