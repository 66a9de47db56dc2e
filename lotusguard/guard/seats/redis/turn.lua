-- SPDX-License-Identifier: Apache-2.0
-- Which guard listens in the rooms of the account, and what is known of these rooms.
-- KEYS: the lease; the last token that was given out; the rows of rooms; the rows by the version that changed them; the
-- last version. ARGV[1]: JSON {guard, milliseconds, hears, known, token, rows}.
-- With rows, the holder of the lease writes them: the answer is the new version, -1 if its token is not the current one.
-- Without rows, the lease is got or renewed (for 0 milliseconds: given up). The answer is JSON {token, hears, version,
-- rows, told}: 0 if another guard has the lease, whether the holder hears the rooms, the last version, and the rows that
-- changed since a version, up to the version `told`. More rows follow if that is not the last version.

local request = cjson.decode(ARGV[1])
local lease, fence, rows, order, version = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]

if request.rows then
  local holder = redis.call('HGET', lease, 'guard')
  if holder ~= request.guard or redis.call('HGET', lease, 'token') ~= request.token then return -1 end
  for name, text in pairs(request.rows) do
    if text == cjson.null then redis.call('HDEL', rows, name) else redis.call('HSET', rows, name, text) end
    redis.call('ZADD', order, redis.call('INCR', version), name)
  end
  for _, key in ipairs({fence, rows, order, version}) do redis.call('EXPIRE', key, KEPT) end
  return tonumber(redis.call('GET', version)) or 0
end

local holder = redis.call('HGET', lease, 'guard')
if request.milliseconds == 0 then
  if holder == request.guard then redis.call('DEL', lease) end
  holder = 'nobody'
elseif not holder then
  redis.call('HSET', lease, 'guard', request.guard, 'token', redis.call('INCR', fence))
  redis.call('EXPIRE', fence, KEPT)
  holder = request.guard
end
if holder == request.guard then
  redis.call('HSET', lease, 'hears', request.hears and '1' or '0')
  redis.call('PEXPIRE', lease, request.milliseconds)
end

local changed, last = {}, tonumber(redis.call('GET', version)) or 0
local since = request.known > last and 0 or request.known
local after = '(' .. string.format('%.0f', since)
local found = redis.call('ZRANGEBYSCORE', order, after, '+inf', 'WITHSCORES', 'LIMIT', 0, ROWS_AT_ONCE)
for place = 1, #found, 2 do changed[#changed + 1] = {found[place], redis.call('HGET', rows, found[place])} end
local told = #changed == ROWS_AT_ONCE and tonumber(found[#found]) or last
local token = holder == request.guard and redis.call('HGET', lease, 'token') or '0'
return cjson.encode({token, redis.call('HGET', lease, 'hears') == '1', last, changed, told})
