/* A stand-in for NVIDIA's libnvidia-ml.so.1: the functions that bench calls, with answers from a
 * script. The binding (nvidia-ml-py) loads it by its own rule.
 *
 * NVML_SCRIPT names a text file, a line each:
 *   device UUID NAME                          the devices, in order; a UUID of MIG- is an instance
 *   fail FUNCTION CODE [FROM]                 FUNCTION answers CODE, from FROM seconds on
 *   mig 1                                     MIG mode of all devices
 *   at SECONDS POWER_MW UTIL_PERCENT USED_BYTES PROCESSES   what holds from SECONDS on
 * Time is real, counted from nvmlInit, unless standin_set_time has set it. Energy is the integral
 * of power, starting at 5,000,000 mJ; utilisation is that of the second before, as with a real
 * device. UUID and NAME hold no spaces.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct { char uuid[96], name[96]; } Device;
typedef struct { char function[96]; int code; double from; } Failure;
typedef struct { double at, power, util, used; int processes; } Row;
typedef struct { unsigned pid; unsigned long long used; unsigned gi, ci; } Process;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned gpu, memory; } Utilization;

static Device devices[8];
static Failure failures[16];
static Row rows[64];
static int device_count, failure_count, row_count, mig, initialised;
static double start, set_time = -1;

static double real_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

void standin_set_time(double seconds) { set_time = seconds; }

static double now(void) { return set_time >= 0 ? set_time : real_now() - start; }

static int answer(const char *function) {
    if (!initialised) return 1; /* uninitialised */
    for (int i = 0; i < failure_count; i++)
        if (!strcmp(failures[i].function, function) && now() >= failures[i].from)
            return failures[i].code;
    return 0;
}

static Row row_at(double t) {
    Row found = rows[0];
    for (int i = 0; i < row_count && rows[i].at <= t; i++) found = rows[i];
    return found;
}

int nvmlInitWithFlags(unsigned flags) {
    char line[400];
    FILE *file = fopen(getenv("NVML_SCRIPT"), "r");
    if (!file) return 9; /* driver not loaded */
    if (!initialised) start = real_now();
    device_count = failure_count = row_count = 0;
    while (fgets(line, sizeof line, file)) {
        Device *d = &devices[device_count];
        Failure *f = &failures[failure_count];
        Row *r = &rows[row_count];
        if (sscanf(line, "device %95s %95s", d->uuid, d->name) == 2) device_count++;
        f->from = 0;
        if (sscanf(line, "fail %95s %d %lf", f->function, &f->code, &f->from) >= 2) failure_count++;
        sscanf(line, "mig %d", &mig);
        if (sscanf(line, "at %lf %lf %lf %lf %d", &r->at, &r->power, &r->util, &r->used,
                   &r->processes) == 5) row_count++;
    }
    fclose(file);
    initialised = 1;
    int code = answer("nvmlInitWithFlags");
    initialised = !code;
    return code;
}

int nvmlShutdown(void) { return initialised ? 0 : 1; }

const char *nvmlErrorString(int code) { return "error of the stand-in"; }

int nvmlDeviceGetCount_v2(unsigned *count) { *count = device_count; return answer("nvmlDeviceGetCount_v2"); }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **device) {
    if (index >= (unsigned)device_count) return 2;
    *device = &devices[index];
    return answer("nvmlDeviceGetHandleByIndex_v2");
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Device **device) {
    for (int i = 0; i < device_count; i++)
        if (!strcmp(devices[i].uuid, uuid)) {
            *device = &devices[i];
            return answer("nvmlDeviceGetHandleByUUID");
        }
    return 6; /* not found */
}

int nvmlDeviceGetName(Device *d, char *out, unsigned size) { snprintf(out, size, "%s", d->name); return answer("nvmlDeviceGetName"); }
int nvmlDeviceGetUUID(Device *d, char *out, unsigned size) { snprintf(out, size, "%s", d->uuid); return answer("nvmlDeviceGetUUID"); }
int nvmlDeviceIsMigDeviceHandle(Device *d, unsigned *is) { *is = !strncmp(d->uuid, "MIG-", 4); return answer("nvmlDeviceIsMigDeviceHandle"); }
int nvmlDeviceGetMigMode(Device *d, unsigned *current, unsigned *pending) { *current = *pending = mig; return answer("nvmlDeviceGetMigMode"); }
int nvmlDeviceGetPowerUsage(Device *d, unsigned *mw) { *mw = row_at(now()).power; return answer("nvmlDeviceGetPowerUsage"); }

int nvmlDeviceGetTotalEnergyConsumption(Device *d, unsigned long long *mj) {
    double sum = 5e6, t = now();
    for (int i = 0; i < row_count && rows[i].at < t; i++) {
        double end = i + 1 < row_count && rows[i + 1].at < t ? rows[i + 1].at : t;
        sum += rows[i].power * (end - rows[i].at);
    }
    *mj = sum;
    return answer("nvmlDeviceGetTotalEnergyConsumption");
}

int nvmlDeviceGetUtilizationRates(Device *d, Utilization *u) { u->gpu = row_at(now() - 1).util; u->memory = 0; return answer("nvmlDeviceGetUtilizationRates"); }

int nvmlDeviceGetMemoryInfo(Device *d, Memory *m) {
    m->total = 1ULL << 36;
    m->used = row_at(now()).used;
    m->free = m->total - m->used;
    return answer("nvmlDeviceGetMemoryInfo");
}

int nvmlDeviceGetComputeRunningProcesses_v3(Device *d, unsigned *count, Process *out) {
    unsigned room = *count, code = answer("nvmlDeviceGetComputeRunningProcesses_v3");
    *count = row_at(now()).processes;
    if (code) return code;
    if (*count > room) return 7; /* insufficient size */
    for (unsigned i = 0; i < *count && out; i++) out[i] = (Process){1000 + i, 1 << 20, 0, 0};
    return 0;
}
