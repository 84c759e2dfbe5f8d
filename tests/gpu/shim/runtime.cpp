// Runs a kernel's blocks one after another on the CPU, each CUDA thread as a fiber that runs until it
// waits for others, and checks what it does:
//
//     memory    kernels are compiled with -fsanitize=thread, which calls __tsan_read4(address) before
//               a read of 4 bytes, and so on; these functions are defined here, not in libtsan.
//               An access must be aligned, inside one array, and ordered with all conflicting
//               accesses to the same bytes; shared memory must be written before it is read
//     warps     all lanes of a mask reach the same operation in the same line
//     blocks    all threads reach the same barrier in the same line
//     numbers   -fsanitize=shift and others call __ubsan_handle_*
//     time      -fsanitize-coverage=trace-pc counts basic blocks
//
// Two accesses are ordered by __syncthreads, and by __syncwarp for the lanes of its mask. Nothing
// orders two blocks. Shuffles and votes do not order memory (CUDA C++ Programming Guide, 7.21 and
// 7.22). As on a GPU with -ftz=true, subnormal float operands and results become zero.
#include "runtime.h"

#include <dlfcn.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

using namespace shim;

// -- State -----------------------------------------------------------------------------------------

static const unsigned WARP = 32, MOST_THREADS = 1024, MOST_SHARED = 227 << 10;
static const size_t STACK = 64 << 10, PAGE = 4096, GAP = 1 << 20, ARENA = size_t(16) << 30;
static const long MOST_STEPS = 4'000'000, WARP_STEPS = 50;  // basic blocks of one thread

struct Index { unsigned x, y, z; };
extern "C" {
Index threadIdx, blockIdx, blockDim, gridDim;
alignas(1024) static unsigned char dynamic_shared[MOST_SHARED];
unsigned char* shim_shared = dynamic_shared;
}

enum State { READY, IN_WARP, IN_BLOCK, DONE };

struct Stop {  // where a thread waits for others
    Operation operation;
    unsigned mask;
    unsigned long long value;
    int argument, width;
    Where where;
};

struct Thread {
    char* stack = nullptr;
    bool started = false;  // its fiber exists and waits in resume
    jmp_buf resume;
    ucontext_t context;
    State state;
    Stop stop;
    unsigned long long result;
    long steps;
    unsigned seen[WARP];  // per lane of its warp: accesses up to this time are ordered before
};

struct Meeting {  // the lanes of a warp that wait at one stop
    Stop stop;
    unsigned lanes;  // 0: nothing is known
};

struct Access {
    unsigned block = 0;  // serial number, 0: none
    unsigned barrier, time;
    unsigned short thread;
    bool atomic;
    const void* code;
};

struct Cell {  // the latest accesses to some bytes, as many as can matter
    Access writes[2], reads[2];
};

struct Region {
    const char* name;
    char* begin;
    size_t size;
    unsigned granule;  // bytes a cell
    bool shared, writable;
    Cell* cells;
};

struct Array {
    const char* name;
    char* host;
    char* device;  // where the kernel finds it
    size_t size;
    unsigned element;
    int writable;
};

static Thread threads[MOST_THREADS];
static Meeting meetings[MOST_THREADS / WARP];
static unsigned count, current, barrier, block_serial;
static std::vector<Region> regions;
static size_t arrays_end;           // later regions are shared memory
static char* arena;                 // holds the arrays, with gaps between them
static std::vector<size_t> owners;  // per GAP bytes of the arena, the array they belong to
static jmp_buf scheduler, bail;
static char message[4096];
static void (*entry)(void**);
static void** entry_arguments;

// -- Errors ----------------------------------------------------------------------------------------

static const char* NAMES[] = {
    "__syncwarp", "__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync",
    "__ballot_sync", "__any_sync", "__all_sync", "__match_any_sync", "mma.sync",
    "__syncthreads", "__syncthreads_count", "__syncthreads_and", "__syncthreads_or"};

static std::string format(const char* text, ...) {
    char buffer[1024];
    va_list arguments;
    va_start(arguments, text);
    vsnprintf(buffer, sizeof buffer, text, arguments);
    va_end(arguments);
    return buffer;
}

[[noreturn]] static void fail(const std::string& what) {
    snprintf(message, sizeof message, "block (%u, %u, %u): %s", blockIdx.x, blockIdx.y, blockIdx.z,
             what.c_str());
    for (unsigned t = 0; t < count; t++)
        if (threads[t].state != DONE) threads[t].started = false;
    _longjmp(bail, 1);
}

static void count_steps(long more) {
    if ((threads[current].steps += more) > MOST_STEPS) fail(format("thread %u does not end", current));
}

static std::string line_of(const void* code) {  // @{file+offset}, for the caller to look up
    Dl_info info;
    if (!dladdr(code, &info)) return "?";
    return format("@{%s+%#zx}", info.dli_fname, size_t((char*)code - (char*)info.dli_fbase) - 1);
}

static std::string stop_of(const Thread& thread) {
    if (thread.state == DONE) return "returned";
    if (thread.state == READY) return "still running";
    const Stop& stop = thread.stop;
    std::string mask = thread.state == IN_WARP ? format("(mask %08x)", stop.mask) : "";
    return format("at %s%s in %s:%d", NAMES[stop.operation], mask.c_str(), stop.where.file,
                  stop.where.line);
}

[[noreturn]] static void deadlock() {
    std::string text = "deadlock:";
    for (unsigned t = 0, first = 0; t < count; t = first) {
        std::string stop = stop_of(threads[t]);
        while (first < count && stop_of(threads[first]) == stop) first++;
        text += format(" threads %u to %u %s;", t, first - 1, stop.c_str());
    }
    fail(text);
}

// -- Fibers ----------------------------------------------------------------------------------------

static void fiber() {
    for (;;) {
        entry(entry_arguments);
        threads[current].state = DONE;
        meetings[current / WARP].lanes = 0;
        if (!_setjmp(threads[current].resume)) _longjmp(scheduler, 1);
    }
}

static void resume(unsigned t) {
    Thread& thread = threads[t];
    current = t;
    threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
    if (_setjmp(scheduler)) return;
    if (thread.started) _longjmp(thread.resume, 1);
    thread.started = true;
    if (!thread.stack) {
        thread.stack = (char*)mmap(nullptr, STACK, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        mprotect(thread.stack, PAGE, PROT_NONE);
    }
    getcontext(&thread.context);
    thread.context.uc_stack = {thread.stack, 0, STACK};
    makecontext(&thread.context, fiber, 0);
    setcontext(&thread.context);
}

static void wait(State state) {
    threads[current].state = state;
    if (!_setjmp(threads[current].resume)) _longjmp(scheduler, 1);
}

static void open_barrier() {  // no thread can run: if they are all at one barrier, open it
    const Stop& first = threads[0].stop;
    unsigned sum = 0;
    for (unsigned t = 0; t < count; t++) {
        const Stop& stop = threads[t].stop;
        if (threads[t].state != IN_BLOCK || stop.operation != first.operation ||
            stop.where.line != first.where.line)
            deadlock();
        sum += stop.argument != 0;
    }
    for (unsigned t = 0; t < count; t++) {
        threads[t].state = READY;
        threads[t].result = first.operation == SYNCTHREADS_AND ? sum == count
                            : first.operation == SYNCTHREADS_OR ? sum > 0 : sum;
    }
    barrier++;
}

static void run_block(std::vector<unsigned>& order, std::mt19937* random) {
    barrier = 0;
    block_serial++;
    memset(meetings, 0, sizeof meetings);
    for (unsigned t = 0; t < count; t++) {
        threads[t].state = READY;
        threads[t].steps = 0;
        memset(threads[t].seen, 0, sizeof threads[t].seen);
        threads[t].seen[t % WARP] = 1;
    }
    for (unsigned left = count; left;) {
        if (random) std::shuffle(order.begin(), order.end(), *random);
        bool moved = false;
        for (unsigned t : order) {
            if (threads[t].state != READY) continue;
            moved = true;
            resume(t);
            left -= threads[t].state == DONE;
        }
        if (!moved) open_barrier();
    }
}

int shim::block(Operation operation, int predicate, Where where) {
    threads[current].stop = {operation, 0, 0, predicate, 0, where};
    wait(IN_BLOCK);
    return int(threads[current].result);
}

// -- Warps -----------------------------------------------------------------------------------------

static unsigned source_lane(unsigned lane, const Stop& stop) {
    unsigned begin = lane & ~(stop.width - 1), end = begin + stop.width, source = lane;
    unsigned argument = stop.argument;
    switch (stop.operation) {
        case SHFL: return begin | (argument & (stop.width - 1));
        case SHFL_UP: return lane >= begin + argument ? lane - argument : lane;
        case SHFL_DOWN: source = lane + argument; break;
        default: source = lane ^ argument;
    }
    return source < end ? source : lane;
}

static double number(bool bf16, unsigned pair, bool upper) {
    unsigned bits = upper ? pair >> 16 : pair & 0xffff;
    if (bf16) {
        bits <<= 16;
        float value;
        memcpy(&value, &bits, sizeof value);
        return value;
    }
    int exponent = bits >> 10 & 31, digits = bits & 1023;
    double value = exponent == 31 ? (digits ? NAN : INFINITY)
                   : exponent     ? ldexp(1024 + digits, exponent - 25)
                                  : ldexp(digits, -24);
    return bits >> 15 ? -value : value;
}

// sum + a[0] b[0] + ... + a[7] b[7] as an A100 does it (Fasi et al., Numerical behavior of NVIDIA
// tensor cores, 2021): products are exact; all are cut off a bit below the last one of the largest,
// and so is the result.
static float add_products(float sum, const double* a, const double* b) {
    double terms[9] = {sum}, largest = fabs(sum), all = sum;
    for (int k = 0; k < 8; k++) {
        terms[k + 1] = a[k] * b[k];
        largest = std::max(largest, fabs(terms[k + 1]));
        all += terms[k + 1];
    }
    if (!std::isfinite(all)) return float(all);
    if (largest == 0) return 0;
    const int unit = ilogb(largest) - 24;
    const double units = ldexp(1, -unit);  // of one
    long long steps = 0;
    for (double term : terms) steps += (long long)(term * units);
    const double exact = ldexp(double(steps), unit);
    float result = float(exact);
    if (fabs(result) > fabs(exact)) result = nextafterf(result, 0);
    return result;
}

static void multiply_matrices(Thread* lanes) {
    const Mma* mma[WARP];
    for (unsigned l = 0; l < WARP; l++) mma[l] = (const Mma*)lanes[l].stop.value;
    double a[16][16], b[8][16];  // b by columns
    for (int l = 0; l < int(WARP); l++)
        for (int i = 0; i < 4; i++) {
            int g = l / 4, k = 2 * (l % 4) + 8 * (i / 2);
            for (int upper = 0; upper < 2; upper++) {
                a[g + 8 * (i % 2)][k + upper] = number(mma[l]->bf16, mma[l]->a[i], upper);
                if (i % 2 == 0) b[g][k + upper] = number(mma[l]->bf16, mma[l]->b[i / 2], upper);
            }
        }
    for (int l = 0; l < int(WARP); l++)
        for (int i = 0; i < 4; i++) {
            const double *row = a[l / 4 + 8 * (i / 2)], *column = b[2 * (l % 4) + i % 2];
            float& sum = mma[l]->sums[i];
            sum = add_products(add_products(sum, row, column), row + 8, column + 8);
        }
}

static void complete(Thread* lanes, const Stop& stop) {
    if (stop.operation == MMA) multiply_matrices(lanes);
    unsigned votes = 0, seen[WARP] = {};
    for (unsigned l = 0; l < WARP; l++) {
        if (!(stop.mask >> l & 1)) continue;
        votes |= unsigned(lanes[l].stop.value != 0) << l;
        if (stop.operation != SYNCWARP) continue;
        for (unsigned k = 0; k < WARP; k++) seen[k] = std::max(seen[k], lanes[l].seen[k]);
    }
    for (unsigned l = 0; l < WARP; l++) {
        if (!(stop.mask >> l & 1)) continue;
        Thread& lane = lanes[l];
        lane.state = READY;
        lane.result = 0;
        unsigned source;
        switch (stop.operation) {
            case SYNCWARP:
                memcpy(lane.seen, seen, sizeof seen);
                lane.seen[l]++;
                break;
            case MMA: break;
            case BALLOT: lane.result = votes; break;
            case ANY: lane.result = votes != 0; break;
            case ALL: lane.result = votes == stop.mask; break;
            case MATCH_ANY:
                for (unsigned k = 0; k < WARP; k++)
                    if (stop.mask >> k & 1 && lanes[k].stop.value == lane.stop.value)
                        lane.result |= 1ull << k;
                break;
            default:
                source = source_lane(l, lane.stop);
                if (!(stop.mask >> source & 1))
                    fail(format("lane %u %s takes the value of lane %u, which is absent", l,
                                stop_of(lane).c_str(), source));
                lane.result = lanes[source].stop.value;
        }
    }
}

unsigned long long shim::warp(Operation operation, unsigned mask, unsigned long long value,
                              int argument, int width, Where where) {
    Thread& me = threads[current];
    unsigned first = current / WARP * WARP, lane = current % WARP;
    me.stop = {operation, mask, value, argument, width, where};
    me.state = IN_WARP;
    count_steps(WARP_STEPS);
    auto refuse = [&](unsigned other, const char* why) {
        fail(format("thread %u (lane %u) %s: lane %u %s", current, lane, stop_of(me).c_str(), other,
                    why));
    };
    if (!(mask >> lane & 1)) refuse(lane, "is not in its own mask");
    auto is_mine = [&](const Stop& stop) {
        return stop.operation == operation && stop.mask == mask && stop.where.line == where.line &&
               stop.width == width;
    };
    Meeting& meeting = meetings[current / WARP];
    if (meeting.lanes && is_mine(meeting.stop)) {
        // Another lane has looked at all, and since then no other has done anything but come here.
        meeting.lanes |= 1u << lane;
    } else {
        meeting = {me.stop, 0};
        unsigned elsewhere = 0;
        for (unsigned l = 0; l < WARP; l++) {
            if (!(mask >> l & 1)) continue;
            if (first + l >= count) refuse(l, "does not exist");
            const Thread& other = threads[first + l];
            if (other.state == DONE) refuse(l, "returned");
            if (other.state != IN_WARP) continue;
            (is_mine(other.stop) ? meeting.lanes : elsewhere) |= 1u << l;
            if (elsewhere >> l & 1 && other.stop.mask >> lane & 1)
                refuse(l, ("is " + stop_of(other)).c_str());
        }
        if (elsewhere) meeting.lanes = 0;
    }
    if (meeting.lanes == mask) {
        meeting.lanes = 0;
        complete(threads + first, me.stop);
    } else {
        wait(IN_WARP);
    }
    return me.result;
}

// -- Memory ----------------------------------------------------------------------------------------

enum Kind { READ, WRITE, ATOMIC };

static bool before_me(const Access& a) {  // is `a` ordered before what this thread does now?
    if (a.block != block_serial) return false;
    if (a.barrier != barrier || a.thread == current) return true;
    return a.thread / WARP == current / WARP && threads[current].seen[a.thread % WARP] >= a.time;
}

static bool same_warp(const Access& a, const Access& b) {
    return a.block == b.block && a.thread / WARP == b.thread / WARP;
}

// Of two unordered accesses, keep one outside the newest one's warp: what comes later between the
// same two barriers cannot be ordered with both.
static void remember(Access* pair, const Access& newest) {
    for (int i = 0; i < 2; i++)
        if (!pair[i].block || before_me(pair[i])) {
            pair[i] = newest;
            return;
        }
    if (same_warp(pair[0], pair[1]) && !same_warp(pair[0], newest)) pair[1] = newest;
}

static std::string place(const Region& region, size_t offset) {
    if (region.shared) return format("byte %zu of %s", offset, region.name);
    return format("%s[%zu]", region.name, offset / region.granule);
}

static const char* verb(Kind kind) {
    return kind == READ ? "reads" : kind == WRITE ? "writes" : "changes atomically";
}

[[noreturn]] static void race(const Region& region, size_t offset, Kind kind, const void* code,
                              const Access& other, bool other_reads) {
    std::string at = place(region, offset);
    std::string whose = other.block == block_serial ? "" : " of another block";
    fail(format("race: thread %u %s %s in %s; thread %u%s %s it in %s, and nothing orders them",
                current, verb(kind), at.c_str(), line_of(code).c_str(), other.thread,
                whose.c_str(), other_reads ? "read" : other.atomic ? "changed" : "wrote",
                line_of(other.code).c_str()));
}

static void check_cell(Region& region, size_t offset, Kind kind, const void* code) {
    Cell& cell = region.cells[offset / region.granule];
    if (region.shared && cell.writes[0].block != block_serial) cell = Cell();
    Access now = {block_serial, barrier, threads[current].seen[current % WARP],
                  (unsigned short)current, kind == ATOMIC, code};
    if (region.shared && !cell.writes[0].block && kind != WRITE)
        fail(format("thread %u %s %s in %s, which was never written", current, verb(kind),
                    place(region, offset).c_str(), line_of(code).c_str()));
    for (const Access& other : cell.writes)
        if (other.block && !before_me(other) && !(other.atomic && now.atomic))
            race(region, offset, kind, code, other, false);
    if (kind == READ) {
        remember(cell.reads, now);
        return;
    }
    for (const Access& other : cell.reads)
        if (other.block && !before_me(other)) race(region, offset, kind, code, other, true);
    cell.reads[0].block = cell.reads[1].block = 0;
    if (kind == WRITE) cell.writes[0].block = cell.writes[1].block = 0;
    remember(cell.writes, now);
}

static Region* find(const char* address) {
    size_t page = size_t(address - arena) / GAP;
    if (page < owners.size()) {
        Region* region = &regions[owners[page]];
        return address >= region->begin && address < region->begin + region->size ? region : nullptr;
    }
    for (size_t i = arrays_end; i < regions.size(); i++)  // shared memory
        if (address >= regions[i].begin && address < regions[i].begin + regions[i].size)
            return &regions[i];
    return nullptr;
}

[[noreturn]] static void outside(const char* address, size_t size, Kind kind, const void* code) {
    const Region* nearest = nullptr;
    long least = 0, offset = 0;
    for (const Region& region : regions) {
        long past = address - region.begin;
        long distance = past < 0 ? -past : std::max(0l, past - long(region.size));
        if (!nearest || distance < least) nearest = &region, least = distance, offset = past;
    }
    std::string where = nearest ? format(", %ld bytes from the beginning of %s, which has %zu",
                                         offset, nearest->name, nearest->size)
                                : "";
    fail(format("thread %u %s %zu bytes outside all arrays in %s%s", current, verb(kind), size,
                line_of(code).c_str(), where.c_str()));
}

static void check(const void* pointer, size_t size, Kind kind, const void* code) {
    const char* address = (const char*)pointer;
    Region* region = find(address);
    if (!region) {
        const char* stack = threads[current].stack;
        if (address >= stack + PAGE && address + size <= stack + STACK) return;
        outside(address, size, kind, code);
    }
    size_t offset = address - region->begin;
    if (offset + size > region->size) outside(address, size, kind, code);
    if (!region->cells) {
        if (kind == READ) return;
        fail(format("thread %u writes %s, which is const, in %s", current,
                    place(*region, offset).c_str(), line_of(code).c_str()));
    }
    for (size_t last = (offset + size - 1) / region->granule, c = offset / region->granule; c <= last;
         c++)
        check_cell(*region, c * region->granule, kind, code);
}

void shim::atomic(const void* address, unsigned size, const void* code) {
    check(address, size, ATOMIC, code);
}

#define HOOK(name, kind, size)                                                                  \
    extern "C" void __tsan_##name##size(const void* address) {                                  \
        check(address, size, kind, __builtin_return_address(0));                                \
    }
#define HOOKS(size)                                                                             \
    HOOK(read, READ, size)                                                                      \
    HOOK(write, WRITE, size)                                                                    \
    HOOK(volatile_read, READ, size)                                                             \
    HOOK(volatile_write, WRITE, size)                                                           \
    HOOK(unaligned_read, READ, size)                                                            \
    HOOK(unaligned_write, WRITE, size)
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)

extern "C" {
void __tsan_read_range(const void* address, size_t size) {
    check(address, size, READ, __builtin_return_address(0));
}
void __tsan_write_range(const void* address, size_t size) {
    check(address, size, WRITE, __builtin_return_address(0));
}
void __tsan_init() {}
void __sanitizer_cov_trace_pc() { count_steps(1); }
}

// -- Numbers ---------------------------------------------------------------------------------------

static void flush_subnormals(bool on) {
#ifdef __SSE__
    _mm_setcsr(on ? _mm_getcsr() | 0x8040 : _mm_getcsr() & ~0x8040);
#endif
}

float shim::fma_ieee(float a, float b, float c) {
    flush_subnormals(false);
    float result = __builtin_fmaf(a, b, c);
    flush_subnormals(true);
    return result;
}

struct Source { const char* file; unsigned line, column; };
#define HANDLER(name, what)                                                                     \
    extern "C" void __ubsan_handle_##name##_abort(const Source* source) {                       \
        fail(format("thread %u: " what " in %s:%u", current, source->file, source->line));      \
    }
HANDLER(type_mismatch_v1, "an address that is not aligned")
HANDLER(shift_out_of_bounds, "a shift by too many bits, or of a bit out of its type")
HANDLER(out_of_bounds, "an index out of bounds")
HANDLER(divrem_overflow, "a division by zero")

// -- One launch ------------------------------------------------------------------------------------

static void add_shared(const char* name, char* begin, size_t size) {
    static Cell* cells[2];
    Cell*& mine = cells[begin != (char*)dynamic_shared];
    if (!mine) mine = (Cell*)calloc(MOST_SHARED, sizeof(Cell));
    if (size) regions.push_back({name, begin, size, 1, true, true, mine});
}

// Returns an error message, or null. order: 0 forward, 1 backward, otherwise a random seed.
extern "C" const char* shim_launch(void (*call)(void**), void** arguments, Array* arrays,
                                   int array_count, const unsigned* grid, const unsigned* block,
                                   unsigned shared_bytes, char* static_begin, char* static_end,
                                   unsigned order) {
    if (!arena)
        arena = (char*)mmap(nullptr, ARENA, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    entry = call;
    entry_arguments = arguments;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    count = block[0] * block[1] * block[2];
    regions.clear();
    owners.assign(1, 0);
    size_t end = GAP;
    for (int i = 0; i < array_count; i++) {
        Array& a = arrays[i];
        a.device = arena + end + size_t(a.host) % 16;  // aligned as on the host, no better
        memcpy(a.device, a.host, a.size);
        Cell* cells = a.writable ? (Cell*)calloc(a.size / a.element + 1, sizeof(Cell)) : nullptr;
        regions.push_back({a.name, a.device, a.size, a.element, false, a.writable != 0, cells});
        end = (end + a.size + 2 * GAP) / GAP * GAP;
        owners.resize(end / GAP, i);
    }
    arrays_end = regions.size();
    add_shared("dynamic shared memory", (char*)dynamic_shared, shared_bytes);
    add_shared("static shared memory", static_begin, size_t(static_end - static_begin));

    std::mt19937 random(order);
    std::vector<unsigned> thread_order(count), block_order(grid[0] * grid[1] * grid[2]);
    for (unsigned i = 0; i < count; i++) thread_order[i] = order == 1 ? count - 1 - i : i;
    for (unsigned i = 0; i < block_order.size(); i++)
        block_order[i] = order == 1 ? unsigned(block_order.size()) - 1 - i : i;
    if (order > 1) std::shuffle(block_order.begin(), block_order.end(), random);

    flush_subnormals(true);
    message[0] = 0;
    if (!_setjmp(bail))
        for (unsigned b : block_order) {
            blockIdx = {b % grid[0], b / grid[0] % grid[1], b / grid[0] / grid[1]};
            run_block(thread_order, order > 1 ? &random : nullptr);
        }
    flush_subnormals(false);
    threads[current].steps = 0;  // its other functions count steps, too
    for (int i = 0; i < array_count; i++) {
        if (arrays[i].writable) memcpy(arrays[i].host, arrays[i].device, arrays[i].size);
        free(regions[i].cells);
    }
    return message[0] ? message : nullptr;
}
