/* A CUDA driver that runs nothing: benchmarks/gpu_host.py builds it as libcuda.so.1.
 *
 * Memory of its devices (two with STAND_IN_DEVICES=2) is memory of the host, kernels have no
 * effect. The first is of compute capability 9.0, or of STAND_IN_MAJOR.0. Launches are counted, and of the last one its dimensions, its stream, its device and
 * its parameters kept. Every function that is not written out below succeeds and leaves its
 * outputs as they are.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef unsigned long long Address;
typedef int Result;
enum { SUCCESS, OUT_OF_MEMORY = 2, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, CAPTURE_UNSUPPORTED = 900 };
enum { GLOBAL, THREAD_LOCAL, RELAXED }; /* modes of a capture */
enum { MULTIPROCESSORS = 16, MAJOR = 75, MINOR = 76, SHARED_OF_ALL = 81, SHARED_OPTIN = 97 };
enum { SHARED_ALLOWED = 8 }; /* attribute of a kernel */
enum { VERSION = 13000, MOST_PARAMETERS = 32, DEPTH = 16, DEVICES = 2 };
#define ROOM ((size_t)1 << 36)

typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream;
} Configuration;

static _Thread_local char *contexts[DEPTH]; /* 1 + the number of a device, as a pointer */
static _Thread_local int depth;
static size_t handles = 0x2000;
static char image[1024] = "\177ELF";
static char *memory[DEVICES];
static size_t used[DEVICES];

long stand_in_launches, stand_in_loads, stand_in_links;
long stand_in_allowances; /* how often a kernel was allowed more shared memory; and how much, the last time */
int stand_in_allowed;
unsigned stand_in_grid, stand_in_block, stand_in_shared;
void *stand_in_stream;
int stand_in_device;
Address stand_in_parameters[MOST_PARAMETERS];
int stand_in_count; /* how many parameters a kernel has; to be set before its launch */
void *stand_in_captured; /* the stream that is captured now, if there is one */
static _Thread_local int mode = GLOBAL;

static Result nothing(void) { return SUCCESS; }
static Result make(void **handle) { *handle = (void *)(handles += 16); return SUCCESS; }

static int devices(void) {
    const char *given = getenv("STAND_IN_DEVICES");
    return given ? atoi(given) : 1;
}
static Result device_count(int *n) { *n = devices(); return SUCCESS; }
static Result version(int *v) { *v = VERSION; return SUCCESS; }
static Result device_get(int *device, int i) { *device = i; return SUCCESS; }
static Result device_name(char *name, int n, int device) { strncpy(name, "stand-in", n); return SUCCESS; }
static Result device_uuid(char *uuid, int device) { memset(uuid, device, 16); return SUCCESS; }
static Result device_attribute(int *value, int which, int device) {
    const char *given = device ? 0 : getenv("STAND_IN_MAJOR");
    switch (which) {
    case MAJOR: *value = given ? atoi(given) : 9; break;
    case MINOR: *value = 0; break;
    case MULTIPROCESSORS: *value = 132; break;
    case SHARED_OF_ALL: *value = 228 << 10; break;
    case SHARED_OPTIN: *value = 227 << 10; break;
    default: *value = 1024;
    }
    return SUCCESS;
}

static Result retain(char **context, int device) { *context = (char *)0 + 1 + device; return SUCCESS; }
static Result current(char **context) { *context = depth ? contexts[depth - 1] : 0; return SUCCESS; }
static Result push(char *context) {
    if (depth == DEPTH) return INVALID_CONTEXT;
    contexts[depth++] = context;
    return SUCCESS;
}
static Result set_current(char *context) {
    if (!depth) return push(context);
    contexts[depth - 1] = context;
    return SUCCESS;
}
static Result pop(char **context) {
    if (!depth) return INVALID_CONTEXT;
    char *top = contexts[--depth];
    if (context) *context = top;
    return SUCCESS;
}
static Result context_device(int *device) {
    if (!depth || !contexts[depth - 1]) return INVALID_CONTEXT;
    *device = contexts[depth - 1] - (char *)0 - 1;
    return SUCCESS;
}

static Result stream_make(size_t *stream, unsigned flags) {
    int device;
    if (context_device(&device)) return INVALID_CONTEXT;
    *stream = (handles += 16) | device;
    return SUCCESS;
}
static Result stream_device(size_t stream, int *device) { *device = stream & 15; return SUCCESS; }
static Result stream_context(size_t stream, char **context) { return retain(context, stream & 15); }

static Result is_capturing(void *stream, int *status) {
    *status = stream && stream == stand_in_captured;
    return SUCCESS;
}
static Result exchange_mode(int *other) {
    int before = mode;
    mode = *other;
    *other = before;
    return SUCCESS;
}

static Result allocate(Address *address, size_t n) {
    int device;
    if (context_device(&device)) return INVALID_CONTEXT;
    if (stand_in_captured && mode != RELAXED) return CAPTURE_UNSUPPORTED;
    if (!memory[device]) {
        memory[device] = mmap(0, ROOM, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory[device] == MAP_FAILED) return OUT_OF_MEMORY;
    }
    if (used[device] + n > ROOM) return OUT_OF_MEMORY;
    *address = (Address)(memory[device] + used[device]);
    used[device] += n / 256 * 256 + 256;
    return SUCCESS;
}
static Result memory_info(size_t *left, size_t *total) { *left = *total = ROOM; return SUCCESS; }
static Result pointer_attribute(void *value, int which, Address address) {
    *(int *)value = memory[1] && address >= (Address)memory[1] && address < (Address)memory[1] + ROOM;
    return SUCCESS;
}
static Result copy(void *to, const void *from, size_t n) { memcpy(to, from, n); return SUCCESS; }

static Result load(void **library, const void *code) {
    if (memcmp(code, image, 4)) return INVALID_IMAGE;
    stand_in_loads++;
    return make(library);
}
static Result kernel(void **kernel, void *library, const char *name) { return make(kernel); }
static Result kernel_attribute(int *value, int which, void *kernel, int device) { *value = 32; return SUCCESS; }
static Result allow(int which, int value, void *kernel, int device) {
    if (which != SHARED_ALLOWED) return SUCCESS;
    stand_in_allowances++;
    stand_in_allowed = value;
    return SUCCESS;
}
static Result link_create(unsigned n, void *options, void **values, void **state) { return make(state); }
static Result link_complete(void *state, void **code, size_t *n) {
    stand_in_links++;
    *code = image;
    *n = sizeof image;
    return SUCCESS;
}
static Result launch(const Configuration *c, void *kernel, void **parameters, void **extra) {
    if (context_device(&stand_in_device)) return INVALID_CONTEXT;
    stand_in_launches++;
    stand_in_grid = c->grid[0];
    stand_in_block = c->block[0];
    stand_in_shared = c->shared;
    stand_in_stream = c->stream;
    for (int i = 0; i < stand_in_count; i++) memcpy(&stand_in_parameters[i], parameters[i], 8);
    return SUCCESS;
}

static const struct { const char *name; void *function; } KNOWN[] = {
    {"cuDriverGetVersion", version}, {"cuDeviceGetCount", device_count}, {"cuDeviceGet", device_get},
    {"cuDeviceGetName", device_name}, {"cuDeviceGetUuid", device_uuid},
    {"cuDeviceGetAttribute", device_attribute}, {"cuDevicePrimaryCtxRetain", retain},
    {"cuCtxGetCurrent", current}, {"cuCtxSetCurrent", set_current}, {"cuCtxPushCurrent", push},
    {"cuCtxPopCurrent", pop}, {"cuCtxGetDevice", context_device}, {"cuMemAlloc", allocate},
    {"cuMemGetInfo", memory_info}, {"cuPointerGetAttribute", pointer_attribute},
    {"cuMemcpyHtoD", copy}, {"cuMemcpyHtoDAsync", copy}, {"cuMemcpyDtoH", copy},
    {"cuMemcpyDtoHAsync", copy}, {"cuMemcpyDtoD", copy}, {"cuMemcpyDtoDAsync", copy},
    {"cuStreamCreate", stream_make}, {"cuStreamCreateWithPriority", stream_make},
    {"cuStreamIsCapturing", is_capturing}, {"cuThreadExchangeStreamCaptureMode", exchange_mode},
    {"cuStreamGetDevice", stream_device}, {"cuStreamGetCtx", stream_context}, {"cuEventCreate", make},
    {"cuLibraryLoadData", load}, {"cuLibraryGetKernel", kernel}, {"cuKernelGetFunction", kernel},
    {"cuKernelGetAttribute", kernel_attribute}, {"cuKernelSetAttribute", allow}, {"cuLinkCreate", link_create},
    {"cuLinkComplete", link_complete}, {"cuLaunchKernelEx", launch},
};

Result cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, int *status) {
    size_t n = strlen(name);
    if (n > 3 && name[n - 3] == '_' && name[n - 2] == 'v') n -= 3;
    *function = nothing;
    if (n == 16 && !memcmp(name, "cuGetProcAddress", n)) *function = cuGetProcAddress_v2;
    for (size_t i = 0; i < sizeof KNOWN / sizeof *KNOWN; i++)
        if (strlen(KNOWN[i].name) == n && !memcmp(KNOWN[i].name, name, n)) *function = KNOWN[i].function;
    if (status) *status = 0;
    return SUCCESS;
}
Result cuGetProcAddress(const char *name, void **function, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, function, version, flags, 0);
}
