"""XLA's side of the FFI, as far as registering and recording a handler needs it: C structs and callbacks, no GPU.

It stands in for an XLA with version 0.1 of the record interface (jaxlib 0.11.2) whose command buffer is a list.
"""

import ctypes
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    addressof,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_void_p,
)

import jax.numpy as jnp

EXECUTE, RECORD = 3, 4
DTYPES = {jnp.dtype(jnp.int32): 4, jnp.dtype(jnp.bfloat16): 16}


def struct(type_name, /, **fields):
    return type(type_name, (Structure,), {"_fields_": list(fields.items())})


def sized(cls, **values):
    return cls(struct_size=ctypes.sizeof(cls), **values)


HEADER = {"struct_size": c_size_t, "extension_start": c_void_p}
Span = struct("Span", text=c_void_p, length=c_size_t)
Buffer = struct("Buffer", **HEADER, dtype=c_int, data=c_void_p, rank=c_int64, dims=POINTER(c_int64))
Values = struct("Values", **HEADER, size=c_int64, types=c_void_p, values=c_void_p)
Attributes = struct("Attributes", **HEADER, size=c_int64, types=c_void_p, names=c_void_p, values=c_void_p)
Frame = struct(
    "Frame",
    **HEADER,
    api=c_void_p,
    context=c_void_p,
    stage=c_int,
    args=Values,
    results=Values,
    attributes=Attributes,
    future=c_void_p,
)
Version = struct("Version", **HEADER, major=c_int, minor=c_int)
Metadata = struct("Metadata", struct_size=c_size_t, version=Version, traits=c_uint32, state=c_int64)
AskMetadata = struct("AskMetadata", struct_size=c_size_t, type=c_int, next=c_void_p, metadata=POINTER(Metadata))
CreateError = struct("CreateError", **HEADER, message=c_char_p, code=c_int)
GetStream = struct("GetStream", **HEADER, context=c_void_p, stream=c_void_p)
RegisterHandler = struct(
    "RegisterHandler",
    **HEADER,
    name=Span,
    platform=Span,
    instantiate=c_void_p,
    prepare=c_void_p,
    initialize=c_void_p,
    execute=c_void_p,
    record=c_void_p,
    traits=c_uint32,
)
Extension = struct("Extension", struct_size=c_size_t, type=c_int64, major=c_int32, minor=c_int32, next=c_void_p)
FindExtension = struct("FindExtension", **HEADER, context=c_void_p, type=c_int64, found=c_void_p)
Dims = struct("Dims", **{f"{part}_{axis}": c_int32 for part in ("grid", "block", "cluster") for axis in "xyz"})
KernelArg = struct("KernelArg", address=c_void_p, size=c_int64, type=c_int)
KernelArgs = struct("KernelArgs", args=POINTER(KernelArg), count=c_int64)

Call = CFUNCTYPE(c_void_p, c_void_p)  # returns an error, or nothing
CreateLaunch = CFUNCTYPE(
    *(c_void_p, c_void_p, c_char_p, c_void_p, c_int64, c_int, Dims, c_uint32, c_int32),
    *(POINTER(KernelArgs), c_void_p, c_uint32, POINTER(c_void_p)),
)
UpdateLaunch = CFUNCTYPE(c_void_p, c_void_p, c_void_p, POINTER(KernelArgs))
RecordApi = struct(
    "RecordApi", create=CreateLaunch, update=UpdateLaunch, create_copy=c_void_p, update_copy=c_void_p, capture=Call
)
RecordFrame = struct(
    "RecordFrame",
    context=c_void_p,
    api=POINTER(RecordApi),
    action=c_int,
    commands=POINTER(c_void_p),
    num_commands=POINTER(c_int64),
    max_commands=c_int64,
)
RecordExtension = struct("RecordExtension", base=Extension, frame=POINTER(RecordFrame))
FUNCTIONS = 19  # in the interface of version 0.4: errors first, registration fourth, find_extension last
Api = struct("Api", **HEADER, version=Version, internal=c_void_p, functions=c_void_p * FUNCTIONS)


def address(function):
    return ctypes.cast(function, c_void_p).value


def bytes_of(args):
    return [ctypes.string_at(arg.address, arg.size) for arg in args.contents.args[: args.contents.count]]


class FakeXla:
    """`handlers`: what was registered. `events`: what was recorded, in order; `errors`: messages."""

    def __init__(self):
        self.handlers, self.events, self.errors, self.keep = {}, [], [], []
        self.commands, self.num_commands = (c_void_p * 16)(), c_int64(0)
        record_api = RecordApi(
            CreateLaunch(self.create_launch), UpdateLaunch(self.update_launch), None, None, Call(self.capture)
        )
        self.frame = RecordFrame(
            0x77, ctypes.pointer(record_api), 0, self.commands, ctypes.pointer(self.num_commands), 16
        )
        self.extension = RecordExtension(
            Extension(ctypes.sizeof(RecordExtension), 128, 0, 1, None), ctypes.pointer(self.frame)
        )
        functions = {0: self.create_error, 3: self.register, 4: self.stream, 18: self.find_extension}
        self.calls = {place: Call(function) for place, function in functions.items()}
        self.api = sized(Api, version=sized(Version, major=0, minor=4))
        for place, call in self.calls.items():
            self.api.functions[place] = ctypes.cast(call, c_void_p)

    def create_error(self, args):
        self.errors.append(CreateError.from_address(args).message.decode())
        return 0xE0

    def register(self, args):
        given = RegisterHandler.from_address(args)
        assert ctypes.string_at(given.platform.text, given.platform.length) == b"CUDA" and given.traits == 1
        name = ctypes.string_at(given.name.text, given.name.length).decode()
        self.handlers[name] = Call(given.execute), Call(given.record)

    def stream(self, args):
        GetStream.from_address(args).stream = 0x51

    def find_extension(self, args):
        query = FindExtension.from_address(args)
        assert query.type == 128
        query.found = addressof(self.extension)

    def create_launch(self, context, name, image, size, format, dims, smem, programmatic, args, after, count, command):
        assert context == 0x77 and format == 1 and programmatic and count == 0
        self.events.append(("create", name.decode(), ctypes.string_at(image, size), dims, smem, bytes_of(args)))
        command[0] = 0xC0

    def update_launch(self, context, command, args):
        self.events.append(("update", command, bytes_of(args)))

    def capture(self, context):
        self.events.append(("capture",))

    def call_frame(self, stage, **values):
        nothing = {"args": sized(Values), "results": sized(Values), "attributes": sized(Attributes)}
        size = Frame.future.offset  # XLA counts up to the attributes
        return Frame(struct_size=size, api=addressof(self.api), stage=stage, **nothing, **values)

    def ask_metadata(self, handler):
        """What XLA does with a handler that is registered."""
        metadata = sized(Metadata)
        ask = AskMetadata(ctypes.sizeof(AskMetadata), 1, None, ctypes.pointer(metadata))
        frame = self.call_frame(EXECUTE, extension_start=addressof(ask))
        error = handler(addressof(frame))
        return error, metadata

    def record(self, handler, operands, results, update=False):
        """`operands`, `results`: (shape, dtype, address) of each buffer. Returns whether the handler gave an error."""
        self.frame.action = int(update)
        frame = self.call_frame(RECORD, context=0x99)
        for values, buffers in ((frame.args, operands), (frame.results, results)):
            made = []
            for shape, dtype, address in buffers:
                dims = (c_int64 * len(shape))(*shape)
                made.append(sized(Buffer, dtype=DTYPES[jnp.dtype(dtype)], data=address, rank=len(shape), dims=dims))
                self.keep.append(dims)
            pointers = (c_void_p * len(made))(*map(addressof, made))
            types = (c_int * len(made))(*(1 for _ in made))
            self.keep += [made, pointers, types]
            values.size, values.types, values.values = len(made), addressof(types), addressof(pointers)
        failed = handler(addressof(frame)) is not None
        assert frame.stage == RECORD
        return failed
