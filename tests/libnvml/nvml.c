/* A stand-in for libnvidia-ml.so.1: as much of NVML as rms/nvml.py calls, over GPUs that exist only in two files.
 *
 * $RMS_NVML_MACHINE names the machine: what does not change while it runs (tests/standin.py writes it). Beside it lie
 *   MACHINE.state    what does: instances, holders, MIG modes, scripted faults. Text, one thing a line; replaced whole
 *   MACHINE.lock     flock'd around every call: all processes see one machine
 *   MACHINE.journal  one JSON object for each operation, as rms/simulated.py writes them
 *   MACHINE.opened   the number of every GPU that was initialised, one a line
 *   MACHINE.root     the driver's /proc and /dev: entries of capabilities, and their nodes
 * Written from nvml.h and facts about the driver, not from a GPU: it shows that the backend speaks NVML as documented,
 * and nothing about hardware. What a comment calls NVML's is so documented; the rest is made to be hard on the caller.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

enum {
    SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15, RESET_REQUIRED = 16, IN_USE = 19,
    INSUFFICIENT_RESOURCES = 23, VERSION_MISMATCH = 25, UNKNOWN = 999
};

/* What nvml.h lays out. Handles are opaque pointers there; here they are numbers, see `handle`. */
typedef uint64_t Handle;
typedef struct { unsigned start, size; } Place;
typedef struct {
    unsigned version, id, p2p, slices, instances, processors, copy, decoders, encoders, jpeg, ofa;
    unsigned long long memory_mb;
    char name[96];
} GpuProfile;
typedef struct {
    unsigned version, id, slices, instances, processors, copy, decoders, encoders, jpeg, ofa;
    char name[96];
} ComputeProfile;
typedef struct { Handle device; unsigned id, profile; Place place; } GpuInfo;
typedef struct { Handle device, instance; unsigned id, profile; Place place; } ComputeInfo;
typedef struct { unsigned pid; unsigned long long memory; unsigned gi, ci; } Process;
typedef struct {
    char legacy[16];
    unsigned domain, bus, device, id, subsystem;
    char bus_id[32];
} Pci;
#define VERSION(type, number) ((unsigned)sizeof(type) | number << 24)

/* The machine. */
#define MOST 64
typedef struct { int slots, resetless, pci; char name[96]; } Model;
typedef struct {
    int model, kind, id, limit, compute, memory, count;
    unsigned long long memory_mb;
    char name[64];
    int starts[16];
} Profile;
typedef struct { int model, minor; char uuid[64], bus[32]; } Gpu;
static struct {
    char path[4096], driver[80], boot[4096];
    int privileged, broken, high, odd_ids, forgetful, passthrough, stale, modify, models, profiles, gpus, latencies;
    Model model[MOST];
    Profile profile[512];
    Gpu gpu[MOST];
    struct { char call[64]; int milliseconds; } latency[MOST];
} machine;

/* Its state. */
typedef struct { int gpu, id, profile, start, serial; } Gi;
typedef struct { int gi, id, slices, index, serial; } Ci; /* gi: the serial of its GPU instance */
typedef struct { int pid, gpu, gi, ci; } Hold;             /* gi -1: the whole GPU */
typedef struct { char call[64]; int gpu, code, after, times; } Fault;
static __thread struct {
    char boot[128];
    int serial, gis, cis, holds, faults, mig[MOST], pending[MOST];
    long journal; /* its size before `last` was written */
    char last[1024];
    Gi gi[1024];
    Ci ci[1024];
    Hold hold[256];
    Fault fault[64];
} state;

static int sessions, references;
static int horizon; /* the newest serial that this session knows of, with option stale; 0 before its first call */
static __thread int lock; /* a thread's, as the state: threads wait for each other at the lock file */

/* Handles: what they stand for, the session that gave them (those of an earlier one are void), and a number: of a GPU
 * its index + 1, of an instance its serial, which is never given again. A MIG device is its compute instance. */
enum { GPU = 1, GI = 2, CI = 3, MIG = 4 };
static Handle handle(int kind, int number) { return (Handle)kind << 56 | (Handle)sessions << 32 | (unsigned)number; }
static int number_of(Handle given, int kind) {
    return given >> 32 == handle(kind, 0) >> 32 ? (int)(given & 0xffffffff) : -1;
}

static FILE *beside(const char *suffix, const char *mode) {
    char path[4200];
    snprintf(path, sizeof path, "%s.%s", machine.path, suffix);
    return fopen(path, mode);
}

static long journal_size(void) {
    char path[4200];
    struct stat found;
    snprintf(path, sizeof path, "%s.journal", machine.path);
    return stat(path, &found) ? 0 : (long)found.st_size;
}

static void write_last(void) {
    FILE *file = beside("journal", "ae");
    fprintf(file, "%s\n", state.last);
    fclose(file);
}

/* NVML's: a GPU instance (ci -1) or compute instance has an entry in /proc while it exists, a new one each time; and
 * where that does not forbid it, NVML lets nvidia-modprobe make its node, for everybody to read, or make it so again.
 * The line to be overwritten comes first, since these are plain files. */
static void capability(int gpu, int gi, int ci, int there) {
    char name[64], word[64], directory[4300], path[4400];
    int number, minor = -1;
    FILE *file;
    snprintf(name, sizeof name, ci < 0 ? "gi%d" : "gi%d/ci%d", gi, ci);
    snprintf(directory, sizeof directory, "%s.root/proc/driver/nvidia/capabilities/gpu%d/mig/%s", machine.path,
             machine.gpu[gpu].minor, name);
    snprintf(path, sizeof path, "%s/access", directory);
    if (!there) {
        unlink(path);
        rmdir(directory);
        return;
    }
    snprintf(path, sizeof path, "%s.root/proc/driver/nvidia-caps/mig-minors", machine.path);
    if (!(file = fopen(path, "re"))) return;
    snprintf(path, sizeof path, "gpu%d/%s/access", machine.gpu[gpu].minor, name);
    while (minor < 0 && fscanf(file, "%63s %d", word, &number) == 2)
        if (!strcmp(word, path)) minor = number;
    fclose(file);
    mkdir(directory, 0755);
    snprintf(path, sizeof path, "%s/access", directory);
    if (!(file = fopen(path, "we"))) return;
    fprintf(file, "DeviceFileModify: %d\nDeviceFileMinor: %d\nDeviceFileMode: 292\n", machine.modify, minor);
    fclose(file);
    if (!machine.modify) return;
    snprintf(path, sizeof path, "%s.root/dev/nvidia-caps/nvidia-cap%d", machine.path, minor);
    if (mknod(path, S_IFCHR | 0444, makedev(1, minor)) && errno != EEXIST) return;
    if (chmod(path, 0444) || chown(path, 0, 0)) return;
}

static void save(void) {
    char from[4200], to[4200];
    FILE *file = beside("state.new", "we");
    fprintf(file, "boot %s\nserial %d\n", state.boot, state.serial);
    for (int i = 0; i < machine.gpus; i++) fprintf(file, "mig %d %d %d\n", i, state.mig[i], state.pending[i]);
    for (int i = 0; i < state.gis; i++) {
        Gi *gi = &state.gi[i];
        fprintf(file, "gi %d %d %d %d %d\n", gi->gpu, gi->id, gi->profile, gi->start, gi->serial);
    }
    for (int i = 0; i < state.cis; i++) {
        Ci *ci = &state.ci[i];
        fprintf(file, "ci %d %d %d %d %d\n", ci->gi, ci->id, ci->slices, ci->index, ci->serial);
    }
    for (int i = 0; i < state.holds; i++) {
        Hold *hold = &state.hold[i];
        fprintf(file, "hold %d %d %d %d\n", hold->pid, hold->gpu, hold->gi, hold->ci);
    }
    for (int i = 0; i < state.faults; i++) {
        Fault *fault = &state.fault[i];
        fprintf(file, "fault %s %d %d %d %d\n", fault->call, fault->gpu, fault->code, fault->after, fault->times);
    }
    fprintf(file, "last %ld %s\n", state.journal, state.last);
    fclose(file);
    snprintf(from, sizeof from, "%s.state.new", machine.path);
    snprintf(to, sizeof to, "%s.state", machine.path);
    rename(from, to);
}

static void load(void) {
    char line[1200], boot[128] = "";
    FILE *file = beside("state", "re");
    memset(&state, 0, sizeof state);
    for (int i = 0; i < MOST; i++) state.mig[i] = state.pending[i] = 1;
    while (file && fgets(line, sizeof line, file)) {
        Gi *gi = &state.gi[state.gis];
        Ci *ci = &state.ci[state.cis];
        Hold *hold = &state.hold[state.holds];
        Fault *fault = &state.fault[state.faults];
        int which, now, later, at;
        line[strcspn(line, "\n")] = 0;
        if (!strncmp(line, "boot ", 5)) snprintf(state.boot, sizeof state.boot, "%.127s", line + 5);
        sscanf(line, "serial %d", &state.serial);
        if (sscanf(line, "mig %d %d %d", &which, &now, &later) == 3)
            state.mig[which] = now, state.pending[which] = later;
        state.gis += sscanf(line, "gi %d %d %d %d %d", &gi->gpu, &gi->id, &gi->profile, &gi->start, &gi->serial) == 5;
        state.cis += sscanf(line, "ci %d %d %d %d %d", &ci->gi, &ci->id, &ci->slices, &ci->index, &ci->serial) == 5;
        state.holds += sscanf(line, "hold %d %d %d %d", &hold->pid, &hold->gpu, &hold->gi, &hold->ci) == 4;
        state.faults += sscanf(line, "fault %63s %d %d %d %d", fault->call, &fault->gpu, &fault->code, &fault->after,
                               &fault->times) == 5;
        if (sscanf(line, "last %ld %n", &state.journal, &at) == 1)
            snprintf(state.last, sizeof state.last, "%.1023s", line + at);
    }
    if (file) fclose(file);
    if (*state.last && journal_size() == state.journal) write_last(); /* a writer was killed between state and line */
    if ((file = fopen(machine.boot, "re"))) {
        if (fgets(boot, sizeof boot, file)) boot[strcspn(boot, "\n")] = 0;
        fclose(file);
    }
    if (strcmp(boot, state.boot)) { /* NVML's: no instance survives a reboot; MIG mode does on Ampere alone */
        for (int i = 0; i < machine.gpus; i++) {
            int lost = *state.boot && machine.model[machine.gpu[i].model].resetless;
            state.mig[i] = state.pending[i] = lost ? 0 : state.pending[i];
        }
        snprintf(state.boot, sizeof state.boot, "%s", boot);
        for (int i = 0; i < state.cis; i++)
            for (int j = 0; j < state.gis; j++)
                if (state.gi[j].serial == state.ci[i].gi) capability(state.gi[j].gpu, state.gi[j].id, state.ci[i].id, 0);
        for (int i = 0; i < state.gis; i++) capability(state.gi[i].gpu, state.gi[i].id, -1, 0);
        state.gis = state.cis = state.holds = state.faults = 0;
        save();
    }
}

/* Every call begins with `enter` and ends with `leave`; between them the machine is this call's alone. */
static int leave(int code) {
    close(lock);
    return code;
}

/* The code of a fault that is scripted for a call on a GPU, and its counting down. */
static int strike(const char *call, int gpu) {
    for (int i = 0; i < state.faults; i++) {
        Fault *fault = &state.fault[i];
        if (strcmp(fault->call, "*") && strcmp(fault->call, call)) continue;
        if ((fault->gpu != -1 && fault->gpu != gpu) || !fault->times) continue;
        if (fault->after > 0) {
            fault->after--;
            save();
            continue;
        }
        if (fault->times > 0) {
            fault->times--;
            save();
        }
        return fault->code;
    }
    return SUCCESS;
}

static int enter(const char *call, Handle given, int *gpu, Gi **gi, Ci **ci, int privileged, int needs_mig) {
    char path[4200];
    int code = SUCCESS, at = -1;
    if (!references) return UNINITIALIZED;
    for (int i = 0; i < machine.latencies; i++)
        if (!strcmp(machine.latency[i].call, call)) usleep(1000 * machine.latency[i].milliseconds);
    snprintf(path, sizeof path, "%s.lock", machine.path);
    if ((lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666)) < 0 || flock(lock, LOCK_EX)) return UNKNOWN;
    load();
    if (!horizon) horizon = state.serial + 1;
    if (!given) return SUCCESS;
    int number = number_of(given, ci ? gi ? CI : MIG : gi ? GI : GPU);
    if (ci) {
        for (int i = 0; i < state.cis; i++)
            if (state.ci[i].serial == number) *ci = &state.ci[i], at = i;
        if (at >= 0) number = state.ci[at].gi, at = -1;
        else number = -1;
    }
    if (ci || gi) {
        for (int i = 0; i < state.gis; i++)
            if (state.gi[i].serial == number) at = i;
        if (at >= 0 && gi) *gi = &state.gi[at];
        *gpu = at >= 0 ? state.gi[at].gpu : -1;
    } else {
        *gpu = number - 1;
    }
    if (*gpu < 0 || *gpu >= machine.gpus) code = INVALID_ARGUMENT; /* a handle of something that is no more */
    else if ((code = strike(call, *gpu))) return code;
    else if (needs_mig && !state.mig[*gpu]) code = NOT_SUPPORTED;
    else if (privileged && geteuid() != (uid_t)machine.privileged) code = NO_PERMISSION;
    return code;
}
#define ENTER(given, gpu, gi, ci, privileged, needs_mig)                                                         \
    do {                                                                                                         \
        int entered = enter(__func__, given, gpu, gi, ci, privileged, needs_mig);                                \
        if (entered == UNINITIALIZED) return entered;                                                            \
        if (entered) return leave(entered);                                                                      \
    } while (0)

static Profile *profile_by(int gpu, int id, int kind) {
    for (int i = 0; i < machine.profiles; i++) {
        Profile *p = &machine.profile[i];
        if (p->model == machine.gpu[gpu].model && (id < 0 || p->id == id) && (kind < 0 || p->kind == kind)) return p;
    }
    return NULL;
}

/* How many MIG devices a GPU can have: as many as of its smallest profile. */
static int most_devices(int gpu) {
    int most = 0;
    for (int i = 0; i < machine.profiles; i++) {
        Profile *p = &machine.profile[i];
        if (p->model == machine.gpu[gpu].model && p->limit > most) most = p->limit;
    }
    return most;
}

/* The name of a MIG device follows from its place, and so it comes back: on real GPUs too, although nobody promises. */
static void mig_uuid(int gpu, int gi, int ci, char *out) {
    char text[128];
    uint64_t half[2] = {14695981039346656037u, 1099511628211u};
    snprintf(text, sizeof text, "%s/%d/%d", machine.gpu[gpu].uuid, gi, ci);
    for (int h = 0; h < 2; h++)
        for (char *c = text; *c; c++) half[h] = (half[h] ^ (unsigned char)*c) * 1099511628211u;
    snprintf(out, 64, "MIG-%08x-%04x-5%03x-a%03x-%012llx", (unsigned)(half[0] >> 32),
             (unsigned)(half[0] >> 16 & 0xffff), (unsigned)(half[0] & 0xfff), (unsigned)(half[1] >> 52),
             (unsigned long long)(half[1] & 0xffffffffffff));
}

/* An operation: whatever came of it goes into the state and then into the journal. */
static int done(const char *op, int gpu, const Gi *gi, const Ci *ci, int code) {
    struct timespec now;
    char uuid[80] = "", more[160] = "";
    clock_gettime(CLOCK_REALTIME, &now);
    if (gi) {
        Profile *p = profile_by(gpu, gi->profile, -1);
        snprintf(more, sizeof more, "\"gi\": %d, \"profile\": \"%s\", \"start\": %d, \"size\": %d, ", gi->id,
                 p ? p->name : "", gi->start, p ? p->memory : 0);
    }
    if (ci) mig_uuid(gpu, gi->id, ci->id, uuid);
    state.journal = journal_size();
    snprintf(state.last, sizeof state.last,
             "{\"t\": %lld.%06ld, \"op\": \"%s\", \"gpu\": \"%s\", %s\"ci\": %d, \"uuid\": \"%s\", \"pid\": %d, "
             "\"code\": %d}",
             (long long)now.tv_sec, now.tv_nsec / 1000, op, machine.gpu[gpu].uuid, more, ci ? ci->id : 0, uuid,
             getpid(), code);
    return code;
}

static int end(int code) {
    save();
    write_last();
    return leave(code);
}

static int alive(int pid) {
    char path[32];
    snprintf(path, sizeof path, "/proc/%d", pid);
    return !access(path, F_OK);
}

/* Whether a living process holds a compute instance, a GPU instance (ci -1) or the whole GPU (both -1). */
static int held(int gpu, int gi, int ci) {
    for (int i = 0; i < state.holds; i++) {
        Hold *h = &state.hold[i];
        if (h->gpu == gpu && h->gi == gi && (ci < 0 || h->ci == ci) && alive(h->pid)) return 1;
    }
    return 0;
}

/* The session. */

int nvmlInitWithFlags(unsigned flags) {
    char line[1200], call[64], starts[256];
    const char *path = getenv("RMS_NVML_MACHINE");
    FILE *file;
    (void)flags;
    if (references && path && !strcmp(path, machine.path)) return references++, SUCCESS;
    memset(&machine, 0, sizeof machine);
    snprintf(machine.path, sizeof machine.path, "%s", path ? path : "");
    if (!path || !(file = fopen(path, "re"))) return DRIVER_NOT_LOADED;
    while (fgets(line, sizeof line, file)) {
        Model *m = &machine.model[machine.models];
        Profile *p = &machine.profile[machine.profiles];
        Gpu *g = &machine.gpu[machine.gpus];
        int milliseconds;
        line[strcspn(line, "\n")] = 0;
        sscanf(line, "driver %79s", machine.driver);
        sscanf(line, "boot %4095[^\n]", machine.boot);
        sscanf(line, "privileged %d", &machine.privileged);
        sscanf(line, "broken %d", &machine.broken);
        sscanf(line, "modify %d", &machine.modify);
        machine.high |= !strcmp(line, "option high");
        machine.odd_ids |= !strcmp(line, "option odd-ids");
        machine.forgetful |= !strcmp(line, "option no-persistence");
        machine.passthrough |= !strcmp(line, "option passthrough");
        machine.stale |= !strcmp(line, "option stale");
        if (sscanf(line, "latency %63s %d", call, &milliseconds) == 2) {
            snprintf(machine.latency[machine.latencies].call, 64, "%s", call);
            machine.latency[machine.latencies++].milliseconds = milliseconds;
        }
        machine.models += sscanf(line, "model %d %d %x %95[^\n]", &m->slots, &m->resetless, &m->pci, m->name) == 4;
        if (sscanf(line, "profile %d %d %d %d %d %d %llu %63s %255s", &p->model, &p->kind, &p->id, &p->limit,
                   &p->compute, &p->memory, &p->memory_mb, p->name, starts) == 9) {
            for (char *word = strtok(starts, ","); word; word = strtok(NULL, ",")) p->starts[p->count++] = atoi(word);
            machine.profiles++;
        }
        machine.gpus += sscanf(line, "gpu %63s %d %d %31s", g->uuid, &g->model, &g->minor, g->bus) == 4;
    }
    fclose(file);
    if (machine.broken) return machine.broken;
    references++;
    sessions = (sessions + 1) & 0xffffff;
    horizon = 0;
    return SUCCESS;
}

int nvmlShutdown(void) {
    if (!references) return UNINITIALIZED;
    references--;
    return SUCCESS;
}

const char *nvmlErrorString(int code) {
    (void)code;
    return "an error of the stand-in";
}

int nvmlSystemGetDriverVersion(char *out, unsigned length) {
    if (!references) return UNINITIALIZED;
    return snprintf(out, length, "%s", machine.driver) < (int)length ? SUCCESS : INSUFFICIENT_SIZE;
}

/* GPUs. */

static int opened(const char *call, int gpu, Handle *out) {
    FILE *file = beside("opened", "ae");
    fprintf(file, "%d\n", gpu);
    fclose(file);
    int code = strike(call, gpu);
    if (!code) *out = handle(GPU, gpu + 1);
    return code;
}

int nvmlDeviceGetCount_v2(unsigned *out) {
    ENTER(0, NULL, NULL, NULL, 0, 0);
    *out = machine.gpus;
    return leave(SUCCESS);
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Handle *out) {
    ENTER(0, NULL, NULL, NULL, 0, 0);
    return leave(index < (unsigned)machine.gpus ? opened(__func__, index, out) : INVALID_ARGUMENT);
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, Handle *out) {
    ENTER(0, NULL, NULL, NULL, 0, 0);
    for (int i = 0; i < machine.gpus; i++)
        if (!strcasecmp(machine.gpu[i].bus, bus)) return leave(opened(__func__, i, out));
    return leave(NOT_FOUND);
}

/* NVML's: "may initialize additional GPUs as it searches", and GPU_IS_LOST "if any GPU has fallen off the bus". */
int nvmlDeviceGetHandleByUUID(const char *uuid, Handle *out) {
    ENTER(0, NULL, NULL, NULL, 0, 0);
    for (int i = 0; i < machine.gpus; i++) {
        int code = opened(__func__, i, out);
        if (code || !strcmp(machine.gpu[i].uuid, uuid)) return leave(code);
    }
    *out = 0;
    return leave(*uuid ? NOT_FOUND : INVALID_ARGUMENT);
}

int nvmlDeviceGetUUID(Handle device, char *out, unsigned length) {
    int gpu;
    Ci *ci;
    char uuid[64];
    if (device >> 56 == MIG) {
        ENTER(device, &gpu, NULL, &ci, 0, 0);
        for (int i = 0; i < state.gis; i++)
            if (state.gi[i].serial == ci->gi) mig_uuid(gpu, state.gi[i].id, ci->id, uuid);
    } else {
        ENTER(device, &gpu, NULL, NULL, 0, 0);
        snprintf(uuid, sizeof uuid, "%s", machine.gpu[gpu].uuid);
    }
    return leave(snprintf(out, length, "%s", uuid) < (int)length ? SUCCESS : INSUFFICIENT_SIZE);
}

int nvmlDeviceGetName(Handle device, char *out, unsigned length) {
    int gpu;
    ENTER(device, &gpu, NULL, NULL, 0, 0);
    snprintf(out, length, "%s", machine.model[machine.gpu[gpu].model].name);
    return leave(SUCCESS);
}

int nvmlDeviceGetMinorNumber(Handle device, unsigned *out) {
    int gpu;
    ENTER(device, &gpu, NULL, NULL, 0, 0);
    *out = machine.gpu[gpu].minor;
    return leave(SUCCESS);
}

int nvmlDeviceGetPciInfo_v3(Handle device, Pci *out) {
    int gpu;
    ENTER(device, &gpu, NULL, NULL, 0, 0);
    memset(out, 0, sizeof *out);
    out->id = machine.model[machine.gpu[gpu].model].pci << 16 | 0x10de;
    snprintf(out->bus_id, sizeof out->bus_id, "%s", machine.gpu[gpu].bus);
    return leave(SUCCESS);
}

int nvmlDeviceGetPersistenceMode(Handle device, unsigned *out) {
    int gpu;
    ENTER(device, &gpu, NULL, NULL, 0, 0);
    *out = !machine.forgetful;
    return leave(SUCCESS);
}

/* MIG mode. */

int nvmlDeviceGetMigMode(Handle device, unsigned *current, unsigned *pending) {
    int gpu;
    ENTER(device, &gpu, NULL, NULL, 0, 0);
    if (!profile_by(gpu, -1, -1)) return leave(NOT_SUPPORTED);
    *current = state.mig[gpu];
    *pending = state.pending[gpu];
    return leave(SUCCESS);
}

/* NVML's: success, and an activation status that says whether the mode is really on. */
int nvmlDeviceSetMigMode(Handle device, unsigned mode, unsigned *activation) {
    int gpu;
    ENTER(device, &gpu, NULL, NULL, 1, 0);
    if (!profile_by(gpu, -1, -1)) return leave(NOT_SUPPORTED);
    if (mode > 1) return leave(INVALID_ARGUMENT);
    int busy = held(gpu, -1, -1);
    for (int i = 0; i < state.gis; i++) busy |= state.gi[i].gpu == gpu;
    state.pending[gpu] = mode;
    if (!busy && (!machine.passthrough || machine.model[machine.gpu[gpu].model].resetless)) state.mig[gpu] = mode;
    *activation = state.mig[gpu] == (int)mode ? SUCCESS : busy ? IN_USE : RESET_REQUIRED;
    save();
    return leave(SUCCESS);
}

/* GPU instances. */

int nvmlDeviceGetGpuInstanceProfileInfoV(Handle device, unsigned kind, GpuProfile *out) {
    int gpu;
    ENTER(device, &gpu, NULL, NULL, 0, 0);
    if (out->version != VERSION(GpuProfile, 2)) return leave(VERSION_MISMATCH);
    if (kind > 16) return leave(INVALID_ARGUMENT); /* an older driver than the caller's header */
    Profile *p = profile_by(gpu, -1, kind);
    if (!p) return leave(NOT_SUPPORTED);
    *out = (GpuProfile){.version = out->version, .id = p->id, .slices = p->compute, .instances = p->limit,
                        .memory_mb = p->memory_mb};
    snprintf(out->name, sizeof out->name, "MIG %s", p->name);
    return leave(SUCCESS);
}

int nvmlDeviceGetGpuInstancePossiblePlacements_v2(Handle device, unsigned id, Place *out, unsigned *count) {
    int gpu;
    ENTER(device, &gpu, NULL, NULL, 1, 1);
    Profile *p = profile_by(gpu, id, -1);
    if (!p) return leave(INVALID_ARGUMENT);
    for (int i = 0; out && i < p->count; i++) out[i] = (Place){p->starts[i], p->memory};
    *count = p->count;
    return leave(SUCCESS);
}

static int gi_id(const Profile *p, int gpu, int start) {
    int slots = machine.model[machine.gpu[gpu].model].slots;
    if (machine.odd_ids) { /* some driver may count them otherwise: the highest number that is free */
        for (int id = 14;; id--) {
            int used = 0;
            for (int i = 0; i < state.gis; i++) used |= state.gi[i].gpu == gpu && state.gi[i].id == id;
            if (!used) return id;
        }
    }
    return slots / p->memory - 1 + start / p->memory; /* 0 the whole board, 1-2 halves, 3-6 quarters, 7-14 eighths */
}

int nvmlDeviceCreateGpuInstanceWithPlacement(Handle device, unsigned id, const Place *place, Handle *out) {
    int gpu = -1, legal = 0, alike = 0, media = 0, overlap = 0, code;
    if ((code = enter(__func__, device, &gpu, NULL, NULL, 1, 1))) {
        if (code == UNINITIALIZED) return code;
        return gpu < 0 ? leave(code) : end(done("create_gpu_instance", gpu, NULL, NULL, code));
    }
    Profile *p = profile_by(gpu, id, -1);
    for (int i = 0; p && i < p->count; i++) legal |= p->starts[i] == (int)place->start && p->memory == (int)place->size;
    for (int i = 0; p && i < state.gis; i++) {
        Profile *other = profile_by(gpu, state.gi[i].profile, -1);
        if (state.gi[i].gpu != gpu) continue;
        alike += other == p;
        media |= strstr(other->name, "+me") != NULL;
        overlap |= state.gi[i].start < (int)(place->start + place->size) &&
                   (int)place->start < state.gi[i].start + other->memory;
    }
    if (!legal) code = INVALID_ARGUMENT;
    else if (held(gpu, -1, -1)) code = IN_USE; /* a client of the whole GPU */
    else if (overlap || alike >= p->limit || (media && strstr(p->name, "+me"))) code = INSUFFICIENT_RESOURCES;
    if (code) return end(done("create_gpu_instance", gpu, NULL, NULL, code));
    Gi *gi = &state.gi[state.gis];
    *gi = (Gi){gpu, gi_id(p, gpu, place->start), id, place->start, ++state.serial};
    state.gis++;
    *out = handle(GI, gi->serial);
    capability(gpu, gi->id, -1, 1);
    return end(done("create_gpu_instance", gpu, gi, NULL, SUCCESS));
}

int nvmlGpuInstanceDestroy(Handle instance) {
    int gpu = -1, code;
    Gi *gi = NULL;
    if ((code = enter(__func__, instance, &gpu, &gi, NULL, 1, 1))) {
        if (code == UNINITIALIZED) return code;
        return gpu < 0 ? leave(code) : end(done("destroy_gpu_instance", gpu, gi, NULL, code));
    }
    for (int i = 0; i < state.cis; i++)
        if (state.ci[i].gi == gi->serial) code = IN_USE;
    if (held(gpu, gi->id, -1) || held(gpu, -1, -1)) code = IN_USE;
    done("destroy_gpu_instance", gpu, gi, NULL, code);
    if (!code) {
        int id = gi->id;
        *gi = state.gi[--state.gis];
        save();
        capability(gpu, id, -1, 0);
    }
    return end(code);
}

int nvmlDeviceGetGpuInstances(Handle device, unsigned profile, Handle *out, unsigned *count) {
    int gpu, found = 0;
    ENTER(device, &gpu, NULL, NULL, 1, 1);
    if (!profile_by(gpu, profile, -1)) return leave(INVALID_ARGUMENT);
    for (int i = 0; i < state.gis; i++)
        if (state.gi[i].gpu == gpu && state.gi[i].profile == (int)profile)
            out[found++] = handle(GI, state.gi[i].serial);
    *count = found;
    return leave(SUCCESS);
}

int nvmlDeviceGetGpuInstanceById(Handle device, unsigned id, Handle *out) {
    int gpu;
    ENTER(device, &gpu, NULL, NULL, 1, 1);
    for (int i = 0; i < state.gis; i++)
        if (state.gi[i].gpu == gpu && state.gi[i].id == (int)id) {
            *out = handle(GI, state.gi[i].serial);
            return leave(SUCCESS);
        }
    return leave(NOT_FOUND);
}

int nvmlGpuInstanceGetInfo(Handle instance, GpuInfo *out) {
    int gpu;
    Gi *gi;
    ENTER(instance, &gpu, &gi, NULL, 0, 1);
    *out = (GpuInfo){handle(GPU, gpu + 1), gi->id, gi->profile, {gi->start, profile_by(gpu, gi->profile, -1)->memory}};
    return leave(SUCCESS);
}

/* Compute instances. Profile kinds: 1, 2, 3, 4, 7, 8, 6 slices, a variant of 1, and 7 NVL. */

static int compute_slices(unsigned kind, const Profile *p) {
    static const int slices[] = {1, 2, 3, 4, 7};
    return kind < 5 && slices[kind] <= p->compute && (slices[kind] != 3 || p->compute != 4) ? slices[kind] : 0;
}

int nvmlGpuInstanceGetComputeInstanceProfileInfoV(Handle instance, unsigned kind, unsigned engine,
                                                  ComputeProfile *out) {
    int gpu;
    Gi *gi;
    ENTER(instance, &gpu, &gi, NULL, 0, 1);
    if (out->version != VERSION(ComputeProfile, 2)) return leave(VERSION_MISMATCH);
    if (kind > 8 || engine) return leave(INVALID_ARGUMENT);
    Profile *p = profile_by(gpu, gi->profile, -1);
    int slices = compute_slices(kind, p);
    if (!slices) return leave(NOT_SUPPORTED);
    *out = (ComputeProfile){.version = out->version, .id = kind, .slices = slices, .instances = p->compute / slices};
    snprintf(out->name, sizeof out->name, "MIG %dc.%s", slices, p->name);
    return leave(SUCCESS);
}

int nvmlGpuInstanceCreateComputeInstance(Handle instance, unsigned kind, Handle *out) {
    int gpu = -1, code, used = 0, id = 0, index, found;
    Gi *gi = NULL;
    if ((code = enter(__func__, instance, &gpu, &gi, NULL, 1, 1))) {
        if (code == UNINITIALIZED) return code;
        return gpu < 0 ? leave(code) : end(done("create_compute_instance", gpu, gi, NULL, code));
    }
    Profile *p = profile_by(gpu, gi->profile, -1);
    int slices = compute_slices(kind, p);
    for (int i = 0; i < state.cis; i++) used += state.ci[i].gi == gi->serial ? state.ci[i].slices : 0;
    if (!slices) code = NOT_SUPPORTED;
    else if (used + slices > p->compute) code = INSUFFICIENT_RESOURCES;
    if (code) return end(done("create_compute_instance", gpu, gi, NULL, code));
    do { /* the lowest CI id that is free */
        found = 0;
        for (int i = 0; i < state.cis; i++) found |= state.ci[i].gi == gi->serial && state.ci[i].id == id;
    } while (found && ++id);
    index = machine.high ? most_devices(gpu) - 1 : 0;
    do { /* and the first MIG index: what is destroyed leaves a hole */
        found = 0;
        for (int i = 0; i < state.cis; i++)
            for (int j = 0; j < state.gis; j++)
                found |= state.gi[j].serial == state.ci[i].gi && state.gi[j].gpu == gpu && state.ci[i].index == index;
    } while (found && (index += machine.high ? -1 : 1, 1));
    Ci *ci = &state.ci[state.cis++];
    *ci = (Ci){gi->serial, id, slices, index, ++state.serial};
    horizon = state.serial + 1;
    *out = handle(CI, ci->serial);
    capability(gpu, gi->id, ci->id, 1);
    return end(done("create_compute_instance", gpu, gi, ci, SUCCESS));
}

int nvmlComputeInstanceDestroy(Handle instance) {
    int gpu = -1, code;
    Gi *gi = NULL;
    Ci *ci = NULL;
    if ((code = enter(__func__, instance, &gpu, &gi, &ci, 1, 1))) {
        if (code == UNINITIALIZED) return code;
        return gpu < 0 ? leave(code) : end(done("destroy_compute_instance", gpu, gi, ci, code));
    }
    if (held(gpu, gi->id, ci->id)) code = IN_USE;
    done("destroy_compute_instance", gpu, gi, ci, code);
    if (!code) {
        int id = ci->id;
        *ci = state.ci[--state.cis];
        save();
        capability(gpu, gi->id, id, 0);
    }
    return end(code);
}

int nvmlGpuInstanceGetComputeInstances(Handle instance, unsigned kind, Handle *out, unsigned *count) {
    int gpu, found = 0;
    Gi *gi;
    ENTER(instance, &gpu, &gi, NULL, 1, 1);
    int slices = compute_slices(kind, profile_by(gpu, gi->profile, -1));
    if (!slices) return leave(NOT_SUPPORTED);
    for (int i = 0; i < state.cis; i++)
        if (state.ci[i].gi == gi->serial && state.ci[i].slices == slices) out[found++] = handle(CI, state.ci[i].serial);
    *count = found;
    return leave(SUCCESS);
}

int nvmlGpuInstanceGetComputeInstanceById(Handle instance, unsigned id, Handle *out) {
    int gpu;
    Gi *gi;
    ENTER(instance, &gpu, &gi, NULL, 1, 1);
    for (int i = 0; i < state.cis; i++)
        if (state.ci[i].gi == gi->serial && state.ci[i].id == (int)id) {
            *out = handle(CI, state.ci[i].serial);
            return leave(SUCCESS);
        }
    return leave(NOT_FOUND);
}

/* NVML's: `device` is the parent GPU, not the MIG device. */
int nvmlComputeInstanceGetInfo_v2(Handle instance, ComputeInfo *out) {
    int gpu;
    Gi *gi;
    Ci *ci;
    ENTER(instance, &gpu, &gi, &ci, 0, 1);
    unsigned kind = ci->slices == 7 ? 4 : ci->slices - 1;
    *out = (ComputeInfo){handle(GPU, gpu + 1), handle(GI, gi->serial), ci->id, kind, {0, ci->slices}};
    return leave(SUCCESS);
}

/* MIG devices. */

int nvmlDeviceGetMaxMigDeviceCount(Handle device, unsigned *out) {
    int gpu;
    ENTER(device, &gpu, NULL, NULL, 0, 0);
    *out = state.mig[gpu] ? most_devices(gpu) : 0;
    return leave(SUCCESS);
}

int nvmlDeviceGetMigDeviceHandleByIndex(Handle device, unsigned index, Handle *out) {
    int gpu;
    ENTER(device, &gpu, NULL, NULL, 0, 1);
    for (int i = 0; i < state.cis; i++)
        for (int j = 0; j < state.gis; j++)
            if (state.gi[j].serial == state.ci[i].gi && state.gi[j].gpu == gpu && state.ci[i].index == (int)index &&
                (!machine.stale || state.ci[i].serial < horizon)) {
                *out = handle(MIG, state.ci[i].serial);
                return leave(SUCCESS);
            }
    return leave(index % 2 ? INVALID_ARGUMENT : NOT_FOUND); /* a hole: the caller must take either */
}

int nvmlDeviceGetGpuInstanceId(Handle device, unsigned *out) {
    int gpu;
    Ci *ci;
    ENTER(device, &gpu, NULL, &ci, 0, 1);
    for (int i = 0; i < state.gis; i++)
        if (state.gi[i].serial == ci->gi) *out = state.gi[i].id;
    return leave(SUCCESS);
}

int nvmlDeviceGetComputeInstanceId(Handle device, unsigned *out) {
    int gpu;
    Ci *ci;
    ENTER(device, &gpu, NULL, &ci, 0, 1);
    *out = ci->id;
    return leave(SUCCESS);
}

/* Of a GPU: the processes on all of its instances, as NVML does for who has the right to know. */
static int processes(const char *call, Handle device, unsigned *count, Process *out) {
    int gpu, code;
    unsigned found = 0;
    Ci *ci = NULL;
    Gi *gi = NULL;
    if ((code = enter(call, device, &gpu, NULL, device >> 56 == MIG ? &ci : NULL, 0, 0)))
        return code == UNINITIALIZED ? code : leave(code);
    for (int i = 0; ci && i < state.gis; i++)
        if (state.gi[i].serial == ci->gi) gi = &state.gi[i];
    for (int i = 0; i < state.holds; i++) {
        Hold *h = &state.hold[i];
        if (h->gpu != gpu || !alive(h->pid) || (ci && (h->gi != gi->id || h->ci != ci->id))) continue;
        if (found < *count) out[found] = (Process){h->pid, 0, h->gi, h->ci};
        found++;
    }
    code = found > *count ? INSUFFICIENT_SIZE : SUCCESS;
    *count = found;
    return leave(code);
}

int nvmlDeviceGetComputeRunningProcesses_v3(Handle device, unsigned *count, Process *out) {
    return processes(__func__, device, count, out);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(Handle device, unsigned *count, Process *out) {
    (void)device, (void)count, (void)out;
    return NOT_SUPPORTED;
}
/* nvmlDeviceGetMPSComputeRunningProcesses_v3 is left out: a driver may lack a symbol. */
