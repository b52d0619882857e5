/* WHAT    What every folder may use: errors, memory, files, clock, log, progress, threads.
 * OWNS    Nothing of its own; see the headers below.
 * THREADS As each header says.
 * ERRORS  choir_status everywhere (base/error.h).
 * LIMITS  Nothing in base/ knows a model.
 * NEXT    engine/engine.h for the token's path, scheduler/scheduler.h for a request's. */
#pragma once
#include "base/clock.h"
#include "base/error.h"
#include "base/file.h"
#include "base/log.h"
#include "base/memory.h"
#include "base/options.h"
#include "base/page_cache.h"
#include "base/progress.h"
#include "base/thread.h"
#include "base/workers.h"
