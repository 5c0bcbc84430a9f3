"""The buffer of a connection, beside bytes that are simply kept."""

from hypothesis import given
from hypothesis import strategies as st

from headstart.serving.server.transport.receive_buffer import ReceiveBuffer

SIZE = 32
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("fill"), st.text("ab\r\n", max_size=SIZE).map(str.encode)),
        st.tuples(st.just("fill"), st.sampled_from([b"\r\n", b"a\r\n\r\n", b"\r\n\r\nb"])),
        st.tuples(st.just("put"), st.binary(max_size=2)),
        st.tuples(st.sampled_from(["skip", "into"]), st.integers(0, SIZE)),
        st.tuples(st.sampled_from(["head", "compact", "clear"]), st.none()),
    ),
    max_size=40,
)


@given(ACTIONS)
def test_it_gives_what_came_in_the_order_in_which_it_came(actions: list[tuple[str, bytes | int | None]]):
    buffer, kept = ReceiveBuffer(SIZE), b""
    for action, value in actions:
        if isinstance(value, bytes):
            room = buffer.room()
            assert buffer.is_full == (not len(room))
            count = min(len(value), len(room))
            if action == "put":
                buffer.put(memoryview(value[:count]))
            else:
                room[:count] = value[:count]
                buffer.filled(count)
            kept += value[:count]
        elif action == "head":
            while kept.startswith(b"\r\n"):
                kept = kept[2:]
            head, end, rest = kept.partition(b"\r\n\r\n")
            assert buffer.take_head() == (head + end if end else None)
            kept = rest if end else kept
        elif action == "skip" and value is not None:
            buffer.skip(min(value, len(kept)))
            kept = kept[value:]
        elif action == "into" and value is not None:
            target = bytearray(value)
            count = buffer.take_into(memoryview(target))
            assert bytes(target[:count]) == kept[:value]
            kept = kept[value:]
        elif action == "compact":
            buffer.compact()
            assert len(buffer.room()) == SIZE - len(kept)
        else:
            buffer.clear()
            kept = b""
        assert len(buffer) == len(kept)
        assert bytes(buffer.unread()) == kept
