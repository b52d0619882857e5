/* WHAT    The router that learns from feedback: which plan (the model alone, an adapter, a mix) answers which prompt.
 *         policy.h draws, bound.h and trial.h judge, learner.h learns, drift.h watches, journal.h and version.h remember.
 * OWNS    See each.
 * THREADS See each.
 * ERRORS  See each.
 * LIMITS  It knows neither engine nor server: prompts are features, plans are names, answers are rewards.
 * NEXT    router/learn/learner.h; docs/router.md for people */
#pragma once
#include "router/learn/journal.h"
#include "router/learn/learner.h"
#include "router/learn/version.h"
