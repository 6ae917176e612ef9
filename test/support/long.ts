/** Whether it is `npm run test:long`, with as many rounds as it takes to find what happens seldom. */
export const long = process.env["LONG"] !== undefined
